"""transformers' Trainer on our layers: a run that is interrupted and resumed is the run that was not."""

import pytest
import torch
from safetensors.torch import load_file
from support import tiny, words

transformers = tiny.transformers()
peft = pytest.importorskip("peft", reason="peft is not installed: there are no adapters for the Trainer")
import nf4kernels.integrations.peft  # noqa: E402, F401  # it needs peft
from nf4kernels.integrations.transformers import Nf4Config  # noqa: E402  # it needs transformers

STEPS, SAVED = 6, 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return words.directory(tmp_path_factory.mktemp("model"))


class Interrupted(transformers.TrainerCallback):
    """Ends the run at step SAVED, as a machine that is switched off."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == SAVED


def trainer_of(directory, out, callbacks=(), **options):
    """With dropout, a decaying rate and shuffled rows: each of them would show where its state was not restored."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=Nf4Config())
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = torch.randint(3, tiny.SIZES["vocab_size"], (12, 10), generator=torch.Generator().manual_seed(2))
    args = transformers.TrainingArguments(
        str(out), max_steps=STEPS, save_steps=SAVED, logging_steps=1, per_device_train_batch_size=3, learning_rate=1e-2,
        use_cpu=True, report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(peft.get_peft_model(model, lora), args, train_dataset=data, callbacks=list(callbacks))


def curve(trainer) -> dict[int, float]:
    return {log["step"]: float(log["loss"]) for log in trainer.state.log_history if "loss" in log}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_resumed_run_is_the_run_without_the_interruption(directory, tmp_path, checkpointing):
    options = {"gradient_checkpointing": checkpointing}
    whole = trainer_of(directory, tmp_path / "whole", **options)
    whole.train()
    first = trainer_of(directory, tmp_path / "parts", callbacks=[Interrupted()], **options)
    first.train()
    assert list(curve(first)) == [1, 2, 3]
    resumed = trainer_of(directory, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert list(curve(resumed)) == list(range(1, STEPS + 1))
    assert curve(resumed) == curve(whole)
    assert curve(whole)[STEPS] < curve(whole)[1]
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_checkpoint_holds_the_adapters_alone_and_loads_over_a_fresh_base(directory, tmp_path):
    trainer = trainer_of(directory, tmp_path)
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert len(stored) == 2 * len(tiny.layers(trainer.model))
    assert all("lora_" in key for key in stored)
    assert not list(checkpoint.glob("model*.safetensors"))
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=Nf4Config())
    loaded = peft.PeftModel.from_pretrained(base, checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tiny.IDS).logits, trainer.model.eval()(tiny.IDS).logits)
