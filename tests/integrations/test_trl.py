"""TRL's trainers on our layers: what is learnt, that the bytes stay, and that the base alone is the reference."""

import math
from pathlib import Path

import pytest
import torch
from support import tiny, words

from nf4kernels.demo import smollm2
from nf4kernels.demo.data import definitions

transformers = tiny.transformers()
peft, datasets, trl = (
    pytest.importorskip(name, reason=f"{name} is not installed: none of TRL's trainers runs on our layers")
    for name in ("peft", "datasets", "trl")
)
from nf4kernels.integrations.peft import LoraQuantLinear  # noqa: E402  # it needs peft
from nf4kernels.integrations.transformers import Nf4Config  # noqa: E402  # it needs transformers

LAYERS = 7 * tiny.SIZES["num_hidden_layers"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(words.directory(tmp_path_factory.mktemp("model"), initializer_range=0.1))


def settings(out, steps, **more):
    """Of every trainer: small batches on the CPU in fp32, every step logged, nothing printed or saved."""
    return {
        "output_dir": str(out), "max_steps": steps, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16, "gradient_checkpointing": False, **more,
    }  # fmt: skip


def lora(**more):
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **more)


def model_of(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=Nf4Config())


def sentence(first: int, length: int) -> str:
    """Words of the alphabet one after the other, from the `first` on, and around."""
    return " ".join(words.WORDS[(first + i) % len(words.WORDS)] for i in range(length))


def train(trainer, count: int = LAYERS) -> list[dict]:
    """What was logged at each step; the adapters have moved, and the bytes of `count` layers in 4 bits have not."""
    layers = tiny.layers(trainer.model)
    assert len(layers) == sum(isinstance(module, LoraQuantLinear) for module in trainer.model.modules()) == count
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    adapters = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * count
    assert all("lora_" in name for name in adapters)
    trainer.train()
    for name, layer in tiny.layers(trainer.model).items():
        assert torch.equal(layer.weight, before[name]), name
    for name, parameter in trainer.model.named_parameters():
        assert name not in adapters or not torch.equal(parameter, adapters[name]), name
    return trainer.state.log_history[:-1]  # the last one sums the run up


def mean(logs: list[dict], key: str) -> float:
    return sum(float(log[key]) for log in logs) / len(logs)


def test_supervised_fine_tuning_with_packing_from_a_directory(directory, tmp_path):
    data = datasets.Dataset.from_list([{"text": sentence(first, 8)} for first in range(16)] * 4)
    options = {"quantization_config": Nf4Config(), "dtype": torch.float32}
    args = trl.SFTConfig(
        **settings(tmp_path, 24, per_device_train_batch_size=4), learning_rate=1e-2, max_length=32, packing=True,
        packing_strategy="wrapped", model_init_kwargs=options,
    )  # fmt: skip
    trainer = trl.SFTTrainer(directory, args=args, train_dataset=data, peft_config=lora())
    assert len(trainer.train_dataset) < len(data)
    assert max(map(len, trainer.train_dataset["input_ids"])) == 32
    logs = train(trainer)
    assert mean(logs[-3:], "loss") < float(logs[0]["loss"]) - 2


def test_supervised_fine_tuning_on_the_completion_only(directory, tmp_path):
    data = datasets.Dataset.from_list(
        [{"prompt": sentence(first, 3), "completion": " " + sentence(first + 3, 3)} for first in range(16)] * 4
    )
    args = trl.SFTConfig(**settings(tmp_path, 24), learning_rate=1e-2, max_length=32, completion_only_loss=True)
    trainer = trl.SFTTrainer(
        model_of(directory),
        args=args,
        train_dataset=data,
        processing_class=words.tokenizer(),
        peft_config=lora(lora_dropout=0.05),
    )
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert (labels[:, :3] == -100).all()
    assert (labels[:, 3:] >= 0).all()
    logs = train(trainer)
    assert mean(logs[-3:], "loss") < float(logs[0]["loss"]) - 2


def test_preferences_with_the_adapter_switched_off_as_the_reference(directory, tmp_path):
    data = datasets.Dataset.from_list(
        [
            {"prompt": sentence(first, 3), "chosen": " " + sentence(first + 3, 1), "rejected": " " + sentence(first, 1)}
            for first in range(16)
        ]
    )
    args = trl.DPOConfig(**settings(tmp_path, 10), learning_rate=5e-3, max_length=32, beta=0.5)
    trainer = trl.DPOTrainer(
        model_of(directory),
        ref_model=None,
        args=args,
        train_dataset=data,
        processing_class=words.tokenizer(),
        peft_config=lora(),
    )
    assert trainer.ref_model is None
    logs = train(trainer)
    # At first adapter and reference agree; a reference that moved along would leave it so.
    assert float(logs[0]["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert mean(logs[-3:], "loss") < math.log(2) - 0.1
    assert float(logs[-1]["rewards/accuracies"]) == 1
    ids = torch.arange(4, 12)[None]
    with torch.no_grad(), trainer.model.disable_adapter():
        off = trainer.model(input_ids=ids).logits
    assert torch.equal(off, model_of(directory)(input_ids=ids).logits)


def test_group_relative_policy_optimization_with_generation(directory, tmp_path):
    half = tiny.SIZES["vocab_size"] // 2

    def share_of_low_ids(completion_ids, **_):
        return [sum(token < half for token in ids) / max(1, len(ids)) for ids in completion_ids]

    data = datasets.Dataset.from_list([{"prompt": sentence(first, 3)} for first in range(16)])
    args = trl.GRPOConfig(
        **settings(tmp_path, 16, per_device_train_batch_size=32), learning_rate=2e-2, max_completion_length=8,
        num_generations=16,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model_of(directory),
        reward_funcs=share_of_low_ids,
        args=args,
        train_dataset=data,
        processing_class=words.tokenizer(),
        peft_config=lora(),
    )
    logs = train(trainer)
    assert mean(logs[:3], "reward") == pytest.approx(0.5, abs=0.1)
    assert mean(logs[-3:], "reward") > mean(logs[:3], "reward") + 0.25


@pytest.mark.slow
def test_smollm2_learns_definitions(tmp_path):
    try:
        directory = smollm2.fetch(Path(__file__).parents[2] / ".cache")
    except smollm2.FetchError as error:
        pytest.skip(f"needs SmolLM2-135M: {error}")
    data = datasets.Dataset.from_list(definitions()[:64])
    trainer = trl.SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=Nf4Config(), dtype=torch.bfloat16, attn_implementation="eager"
        ),
        args=trl.SFTConfig(**settings(tmp_path, 5, per_device_train_batch_size=8, bf16=True), learning_rate=1e-3),
        train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
        peft_config=lora(),
    )
    logs = train(trainer, count=7 * 30)
    assert mean(logs[-2:], "loss") < float(logs[0]["loss"]) - 1
