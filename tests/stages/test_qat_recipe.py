"""`nf4kernels recover qat` on a small random Llama: it learns, resumes, and writes the bits that it trained with."""

import csv
import json
from contextlib import suppress

import pytest
import torch
import yaml
from support.chat_model import chat_model, facts
from support.finetune_run import write_rows

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is trained")

from safetensors.torch import load_file  # noqa: E402

import nf4kernels as nf4  # noqa: E402
from nf4kernels.cli import main  # noqa: E402
from nf4kernels.recover import Candidate, FakeQuantLinear, Plan  # noqa: E402
from nf4kernels.stages.causal_model import load_causal_model  # noqa: E402
from nf4kernels.stages.finetune.trainer import WHOLE  # noqa: E402
from nf4kernels.stages.recover import qat as stage  # noqa: E402

STEPS = 6
FIELDS = {
    "max_steps": STEPS, "logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True,
    "gradient_checkpointing": False, "dtype": "float32",
}  # fmt: skip
MODES = {"full": {"learning_rate": 2e-3}, "lora": {"learning_rate": 1e-2, "lora_r": 4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "chat"
    chat_model(directory, num_hidden_layers=1, dtype=torch.bfloat16, tie_word_embeddings=True)
    return directory


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": q, "completion": a} for q, a in facts(32)])


def arguments(model, data, out, /, **changes):
    fields = {"model": model, "data": data, "output_dir": out, **FIELDS, **changes}
    return ["recover", "qat", *(f"--{name}={value}" for name, value in fields.items())]


def read_log(out):
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bits_of(model):
    kinds = (nf4.QuantLinear, FakeQuantLinear)
    return {name: each.dequantize(torch.float32) for name, each in model.named_modules() if isinstance(each, kinds)}


@pytest.mark.parametrize("mode", MODES)
def test_it_learns_and_writes_the_bits_that_it_trained_with(base, prompts, tmp_path, capsys, monkeypatch, mode):
    out, seen, write = tmp_path / "out", [], stage._Qat.write

    def watched(self, trainer, recipe):
        seen.append(bits_of(trainer.model))
        write(self, trainer, recipe)
        seen.append(bits_of(trainer.model))

    monkeypatch.setattr(stage._Qat, "write", watched)
    assert main(arguments(base, prompts, out, train=mode, **MODES[mode])) == 0
    said = capsys.readouterr().out
    before, after = (float(said.split(f"loss {when}: ")[1].split()[0]) for when in ("before", "after"))
    assert after < before - 0.2
    losses = [float(row["loss"]) for row in read_log(out)]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text(encoding="utf-8")
    for part in (f"{after:.4f}", "library_name: transformers", "recover qat --config", "answered:"):
        assert part in card
    assert ("| rank |" in card) == (mode == "lora")
    assert yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8")).get("train", "full") == mode
    config = json.loads((out / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["load_in_4bit"]
    model = load_causal_model(out / "model")
    for bits in seen:
        assert bits.keys() == bits_of(model).keys()
        assert len(bits) == 7
        assert all(torch.equal(weight, bits[name]) for name, weight in bits_of(model).items())
    assert (out / "model" / "tokenizer.json").is_file()
    assert not (out / ".dense").exists()
    assert main(arguments(base, prompts, out, train=mode, **MODES[mode])) == 2
    assert "finished" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "at"), [("full", "a step"), ("lora", "the end")])
def test_resumed_it_gives_the_same_log_and_bits(base, prompts, tmp_path, monkeypatch, mode, at):
    whole, out = tmp_path / "whole", tmp_path / "out"
    changes = {"train": mode, **MODES[mode], "max_steps": 4}
    assert main(arguments(base, prompts, whole, **changes)) == 0

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "the end":
            patch.setattr(stage._Qat, "write", stopped)
        else:
            patch.setattr(stage._QatTrainer, "training_step", Fails(stage._QatTrainer.training_step, 3))
        with suppress(KeyboardInterrupt, SystemExit):
            main(arguments(base, prompts, out, **changes))
    assert (out / f"checkpoint-{4 if at == 'the end' else 2}" / WHOLE).exists()
    assert not (out / "model").exists()
    assert main(arguments(base, prompts, out, **changes)) == 0
    assert (out / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    found, expected = (load_file(each / "model" / "model.safetensors") for each in (out, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Fails:
    """A method that is interrupted in its n-th call."""

    def __init__(self, method, after):
        self.method, self.left = method, after

    def __get__(self, instance, owner):
        def call(*args, **kwargs):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return self.method(instance, *args, **kwargs)

        return call


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codebook": "int4"}, "--codebook must be one of nf4, fp4, got int4"),
        ({"codebook": "dense"}, "--codebook must be one of nf4, fp4, got dense"),
        ({"train": "lora", "lora_dropout": 0.1}, "--lora_dropout must be 0, since the adapter is merged, got 0.1"),
        ({"train": "lora", "lora_target_modules": "q_proj"}, "--lora_target_modules must be left out"),
        ({"train": "lora", "use_dora": True}, "--use_dora must be left out with --train lora, got True"),
        ({"train": "lora", "rank_pattern": '{"q_proj": 3}'}, "--rank_pattern must be left out with --train lora"),
        ({"train": "full", "lora_r": 16}, "--lora_r must be left out with --train full"),
        ({"train": "some"}, "invalid choice: 'some'"),
        ({"skip": "nothing"}, "--skip must match a layer, got 'nothing'"),
        ({"nothing": 3}, "--nothing"),
    ],
)
def test_what_is_refused(base, prompts, tmp_path, capsys, changes, said):
    assert main(arguments(base, prompts, tmp_path / "out", **changes)) == 2
    *bar, error = capsys.readouterr().err.splitlines()
    assert error.startswith("nf4kernels recover: ")
    assert said in error
    assert all("Loading weights" in line for line in bar if line)
    assert not (tmp_path / "out").exists()


def test_a_plan_is_refused(base, prompts, tmp_path, capsys):
    Plan({"model.layers.0.mlp.up_proj": Candidate({"codebook": "fp4"})}, 1, 1, 0.0).save(tmp_path / "plan.json")
    assert main(arguments(base, prompts, tmp_path / "out", plan=tmp_path / "plan.json")) == 2
    assert "--plan must be left out, since all layers are rounded alike here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_in_4_bits_is_refused(base, prompts, tmp_path, capsys):
    assert main(["quantize", str(base), str(tmp_path / "in")]) == 0
    capsys.readouterr()
    assert main(arguments(tmp_path / "in", prompts, tmp_path / "out")) == 2
    assert "its weights are quantized already" in capsys.readouterr().err


def test_a_recipe_and_the_fields(prompts, base, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({**FIELDS, "train": "lora", "lora_r": 2, "max_steps": 1, "gradient_checkpointing": True}),
        encoding="utf-8",
    )
    command = ["recover", "qat", "--config", str(recipe), f"--model={base}", f"--data={prompts}"]
    assert main([*command, f"--output_dir={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    state = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert len(state) == 14
    assert all(".lora_" in name for name in state), "the frozen base is not saved again"
    assert main(["recover", "qat", "--help-fields"]) == 0
    said = capsys.readouterr().out
    assert "--train" in said
    assert "--learning_rate" in said
