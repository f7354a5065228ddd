"""A 4-bit model of transformers at work: counted, generating, compiled, trained."""

import copy
import pickle

import pytest
import torch
from support import tiny
from support.directories import dense_directory, load, logits, transformers
from transformers.trainer_utils import validate_quantization_for_training

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_directory(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def model(dense):
    return load(dense, dtype=torch.float32, quantization_config=Nf4Config())


def with_adapters(model, **options):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: no adapters of its own")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **options))


@pytest.mark.parametrize("family", ["Llama", "tied", "GPT-2", "Mixtral"])
def test_counts(tmp_path, family):
    directory = dense_directory(tmp_path, family)
    dense, model = load(directory), load(directory, quantization_config=Nf4Config())
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert model.get_memory_footprint() == sum(tensors.values())
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    assert not hasattr(model, "is_loaded_in_4bit")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_generates(tmp_path, family, cache):
    directory = dense_directory(tmp_path, family)
    options = {"dtype": torch.float32, "quantization_config": Nf4Config()}
    expected, model = load(directory, **options).dequantize(), load(directory, **options)
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    tokens = model.generate(tiny.IDS, **settings)
    assert tokens.shape == (2, tiny.IDS.shape[1] + 6)
    assert torch.equal(tokens, expected.generate(tiny.IDS, **settings))


@pytest.mark.parametrize("adapters", [None, "own", "PEFT's"])
def test_generates_compiled_in_one_graph(model, adapters):
    """With a static cache, as docs/speed.md says: a prompt eagerly, then every token by the one graph."""
    if adapters == "own":
        for layer in tiny.layers(model).values():
            layer.add_lora(nf4.LoraConfig(r=4))
    model = tiny.fill_adapters(with_adapters(model) if adapters == "PEFT's" else model)
    ids, settings = tiny.IDS[:1], {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(input_ids=ids, **settings, disable_compile=True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = transformers.CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    tokens = model.generate(input_ids=ids, **settings, compile_config=config)
    assert len(graphs) == 1
    assert torch.equal(tokens, expected)


def test_copies_and_pickles(model):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert other.num_parameters() == model.num_parameters()
        assert type(other.hf_quantizer) is type(model.hf_quantizer)


def test_compiles_in_one_graph(model):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tiny.IDS, use_cache=False).logits, logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_prepared_for_peft_and_trained(model, reentrant):
    """prepare_for_training in the place of prepare_model_for_kbit_training, before get_peft_model and after it."""
    nf4.prepare_for_training(model, checkpointing=False)
    assert not any(p.requires_grad for p in model.parameters())
    wrapped = with_adapters(model, modules_to_save=["lm_head"])
    trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    nf4.prepare_for_training(wrapped)
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == trainable
    assert any("modules_to_save" in name for name in trainable)
    if reentrant:
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.is_gradient_checkpointing
    validate_quantization_for_training(wrapped)
    wrapped.train()
    wrapped(tiny.IDS, labels=tiny.IDS).loss.backward()
    for name, parameter in wrapped.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name


def test_trainer_wants_adapters(model):
    with pytest.raises(ValueError, match="adapters"):
        validate_quantization_for_training(model)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = (torch.arange(6) * (index + 1)) % 90 + 3
        return {"input_ids": ids, "labels": ids}


def test_a_resumed_run_has_the_same_losses(dense, tmp_path):
    """Trainer saves after two of four steps; the last two are run again from there."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: there is no Trainer")

    def run(directory, resume=None):
        model = load(dense, dtype=torch.float32, quantization_config=Nf4Config())
        wrapped = with_adapters(nf4.prepare_for_training(model))
        torch.manual_seed(0)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.05)
        settings = transformers.TrainingArguments(
            directory, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(wrapped, settings, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses = run(str(tmp_path / "run"))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    again = run(str(tmp_path / "again"), resume=str(tmp_path / "run" / "checkpoint-2"))
    assert again == losses
