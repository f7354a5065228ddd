"""The optimizers of `nf4kernels finetune --optim`: our paged one and torchao's, by transformers' names."""

import csv

import pytest
import torch
from support.chat_model import chat_model, facts
from support.finetune_run import arguments, write_rows

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

from nf4kernels.cli import main  # noqa: E402
from nf4kernels.optim import PagedAdamW  # noqa: E402
from nf4kernels.stages.data.reading import read  # noqa: E402
from nf4kernels.stages.finetune import forecast, run  # noqa: E402
from nf4kernels.stages.finetune.loading import load_tokenizer  # noqa: E402
from nf4kernels.stages.finetune.recipe import read_recipe  # noqa: E402

STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("models") / "chat", num_hidden_layers=1)


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": q, "completion": a} for q, a in facts(16)])


@pytest.fixture(autouse=True)
def no_answers(monkeypatch):
    monkeypatch.setattr(run, "answers", lambda *_: [])


def trained(model, data, out, **changes) -> list[dict[str, str]]:
    """The rows of its log but for what depends on the time."""
    assert main(arguments(model, data, out, max_steps=STEPS, **changes)) == 0
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in csv.DictReader(file)]


def trainer(model, data, out, **changes):
    recipe = read_recipe(None, arguments(model, data, out, **changes)[1:])
    return run._trainer(recipe, read(recipe.sources, recipe.held_out), load_tokenizer(recipe))


def test_the_paged_one_is_torchs_and_takes_its_state(model, prompts, tmp_path):
    """The same losses and the same state in the checkpoint, bit for bit."""
    settings = {"weight_decay": 0.1, "adam_beta2": 0.99}
    plain = trained(model, prompts, tmp_path / "plain", optim="adamw_torch_fused", **settings)
    paged = trained(model, prompts, tmp_path / "paged", optim="paged_adamw_32bit", **settings)
    assert plain == paged
    assert len(plain) >= STEPS
    stored = [
        torch.load(tmp_path / name / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
        for name in ("plain", "paged")
    ]
    assert stored[0]["param_groups"] == stored[1]["param_groups"]
    moments = [[own[name] for own in each["state"].values() for name in sorted(own)] for each in stored]
    assert moments[0]
    assert all(map(torch.equal, *moments))
    found = trainer(model, prompts, tmp_path / "again", optim="paged_adamw_32bit", **settings)
    optimizer = found.create_optimizer()
    assert type(optimizer) is PagedAdamW
    optimizer.load_state_dict(stored[0])


def test_its_state_counts_as_torchs(model, prompts, tmp_path):
    found = [
        forecast.forecast_memory(trainer(model, prompts, tmp_path / "out", optim=optim), 0)
        for optim in ("adamw_torch_fused", "paged_adamw_32bit")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_torchaos(model, prompts, tmp_path, optim):
    """They learn, and a state of theirs is in the checkpoint. Uncompiled, which is faster for a few steps."""
    pytest.importorskip("torchao", reason="torchao is not installed: its optimizers do not run")
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    with torch.compiler.set_stance("force_eager"):
        log = trained(model, prompts, tmp_path / "out", optim=optim, lora_r=64, lora_target_modules=".*q_proj")
    assert float(log[STEPS - 1]["loss"]) < float(log[0]["loss"])
    kind = OptimState8bit if "8bit" in optim else OptimState4bit
    with torch.serialization.safe_globals([kind]):
        stored = torch.load(tmp_path / "out" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    assert any(isinstance(own["exp_avg"], kind) for own in stored["state"].values())
