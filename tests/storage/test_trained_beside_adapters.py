"""What is trained beside the adapters is saved with them, and read back by us and by PEFT."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.adapted_model import CONFIG, WEIGHTS

import nf4kernels as nf4

LORA = nf4.LoraConfig(r=4)
PREFIX = "base_model.model."


def trained(model, *names):
    """`model` with its adapters and those parameters trained, the rest frozen."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        is_trained = "lora_" in name or name in names
        parameter.requires_grad_(is_trained)
        if is_trained:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model):
    with torch.no_grad():
        return model(tiny.IDS).logits


def dense_twin(model, dense):
    """`dense` with the decoded 4-bit weights of `model`."""
    for name, layer in tiny.layers(model).items():
        dense.get_submodule(name).weight.data = layer.dequantize(torch.float32)
    return dense


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (["model.norm.weight"], ["model.norm"]),
        (["model.embed_tokens.weight", "lm_head.weight"], ["model.embed_tokens", "lm_head"]),
        (["model.layers.1.input_layernorm.weight"], ["model.layers.1.input_layernorm"]),
    ],
)
def test_modules_come_back_by_us_and_by_peft(tmp_path, names, modules):
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing is compared to it")
    model = trained(tiny.quantized_llama(lora=LORA), *names)
    nf4.save_adapters(model, tmp_path)
    assert sorted(json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))["modules_to_save"]) == sorted(modules)
    fresh = tiny.quantized_llama().requires_grad_(False)
    nf4.load_adapters(fresh, tmp_path)
    for name in names:
        assert torch.equal(fresh.get_parameter(name), model.get_parameter(name))
        assert fresh.get_parameter(name).requires_grad
    assert torch.equal(logits(fresh), logits(model))
    theirs = peft.PeftModel.from_pretrained(dense_twin(model, tiny.llama()), tmp_path)
    assert any(f"{modules[0]}.modules_to_save" in name for name, _ in theirs.named_modules())
    torch.testing.assert_close(logits(theirs), logits(model))


def test_a_tied_embedding_is_saved_under_both_names(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing is compared to it")
    model = trained(tiny.quantized_llama(lora=LORA, tie_word_embeddings=True), "model.embed_tokens.weight")
    nf4.save_adapters(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert torch.equal(tensors[f"{PREFIX}lm_head.weight"], tensors[f"{PREFIX}model.embed_tokens.weight"])
    theirs = peft.PeftModel.from_pretrained(dense_twin(model, tiny.llama(tie_word_embeddings=True)), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model))


def test_biases_of_4_bit_layers_come_back_by_us_and_by_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing is compared to it")
    names = [f"model.layers.0.self_attn.{leaf}_proj.bias" for leaf in "qk"]
    model = tiny.make("Qwen2ForCausalLM")
    nf4.quantize_model(model, progress=False)
    for name, layer in tiny.layers(model).items():
        if "k_proj" not in name:  # one of the two biases is of a layer without an adapter
            layer.add_lora(LORA)
    trained(model, *names)
    nf4.save_adapters(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))["bias"] == "all"
    fresh = tiny.make("Qwen2ForCausalLM")
    nf4.quantize_model(fresh, progress=False)
    nf4.load_adapters(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    theirs = peft.PeftModel.from_pretrained(dense_twin(model, tiny.make("Qwen2ForCausalLM")), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model))


def test_what_peft_saved_beside_its_adapter_is_read(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing is compared to it")
    model = tiny.make("Qwen2ForCausalLM")
    nf4.quantize_model(model, progress=False)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["norm", "lm_head"], bias="lora_only",
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(dense_twin(model, tiny.make("Qwen2ForCausalLM")), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    nf4.load_adapters(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs.eval()))


def test_a_module_whose_name_ends_anothers_is_not_given_to_peft(tmp_path):
    """PEFT takes "norm" for every module whose name ends so: such a tensor is saved by its own name alone."""
    model = tiny.Net().requires_grad_(False)
    model.final_norm = torch.nn.LayerNorm(64).requires_grad_(False)
    nf4.quantize_model(model, lora=LORA, progress=False)
    model.norm.requires_grad_(True)
    nf4.save_adapters(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))["modules_to_save"] is None
    assert f"{PREFIX}norm.weight" in load_file(tmp_path / WEIGHTS)


def test_prepare_for_training_freezes_all_but_adapters(tmp_path):
    model = tiny.quantized_llama(lora=LORA)
    assert nf4.prepare_for_training(model) is model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(tiny.layers(model))
    assert all("lora_" in name for name in trainable)
    nf4.save_adapters(model, tmp_path)
    assert {name.removeprefix(PREFIX) for name in load_file(tmp_path / WEIGHTS)} == trainable
    assert json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))["modules_to_save"] is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_prepare_for_training_lets_checkpointing_train(reentrant):
    """With frozen embeddings no input of a block requires a gradient: a reentrant checkpoint would give none."""
    model = nf4.prepare_for_training(tiny.quantized_llama(lora=LORA))
    assert model.is_gradient_checkpointing
    if reentrant:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    model(tiny.IDS, labels=tiny.IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_prepare_for_training_without_checkpointing():
    assert not nf4.prepare_for_training(tiny.quantized_llama(lora=LORA), checkpointing=False).is_gradient_checkpointing


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_prepare_for_training_casts_where_bf16_is_slow(monkeypatch, recwarn, wanted):
    monkeypatch.setattr("nf4kernels.model.prepare.training_dtype", lambda device: wanted)
    model = tiny.Net(torch.bfloat16)
    nf4.quantize_model(model, lora=LORA, progress=False)
    packed = model.blocks[0][0].weight
    before = packed.clone()
    nf4.prepare_for_training(model)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {wanted}
    assert model.blocks[0][0].weight is packed
    assert torch.equal(packed, before)
    said = [str(warning.message) for warning in recwarn]
    assert [("float32" in text, "bfloat16" in text) for text in said] == [(True, True)] * (wanted == torch.float32)
    model(torch.arange(10).view(2, 5)).square().mean().backward()
    assert model.blocks[0][0].lora_B.weight.grad is not None


def test_prepare_for_training_freezes_a_model_that_has_no_adapters_yet():
    model = nf4.prepare_for_training(tiny.quantized_llama())
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert model.is_gradient_checkpointing


def test_prepare_for_training_needs_something_to_train():
    with pytest.raises(ValueError, match=r"model must have a layer in 4 bits or an adapter to train, got none"):
        nf4.prepare_for_training(tiny.llama())
    with pytest.raises(TypeError, match=r"prepare_for_training: model must be an nn\.Module, got list"):
        nf4.prepare_for_training([])
