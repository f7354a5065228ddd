"""finetune's held-out loss is the mean over all tokens that are learned, whatever the batches, and of nothing else."""

import math

import pytest
import torch
from support.chat_model import chat_model, facts
from support.finetune_run import FIELDS, write_rows

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

from nf4kernels.stages.data.reading import read  # noqa: E402
from nf4kernels.stages.finetune import run  # noqa: E402
from nf4kernels.stages.finetune.examples import IGNORED  # noqa: E402
from nf4kernels.stages.finetune.loading import load_tokenizer  # noqa: E402
from nf4kernels.stages.finetune.recipe import read_recipe  # noqa: E402

HELD_OUT = 7


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [{"prompt": q, "completion": a * (1 + 4 * (i % 3))} for i, (q, a) in enumerate(facts(32))]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


def trainer_of(model, prompts, out, **changes):
    fields = {"model": model, "data": prompts, "output_dir": out, **FIELDS, "held_out": HELD_OUT, **changes}
    recipe = read_recipe(None, [f"--{name}={value}" for name, value in fields.items()])
    return run._trainer(recipe, read(recipe.sources, recipe.held_out), load_tokenizer(recipe))


def mean_of_tokens(trainer) -> float:
    total, tokens = 0.0, 0
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0, :-1].double()
        learned = torch.tensor(row["labels"])[1:] != IGNORED
        total += float(torch.nn.functional.cross_entropy(logits[learned], ids[0, 1:][learned], reduction="sum"))
        tokens += int(learned.sum())
    return total / tokens


@pytest.mark.parametrize("changes", [{}, {"padding_free": True, "max_length": "null"}], ids=["padded", "padding_free"])
def test_it_is_the_mean_over_tokens(prompts, tmp_path, changes):
    model = chat_model(tmp_path / "model", num_hidden_layers=1)
    for batch in (1, 3, HELD_OUT):
        trainer = trainer_of(model, prompts, tmp_path / f"out{batch}", per_device_eval_batch_size=batch, **changes)
        assert len({len(row["labels"]) for row in trainer.eval_dataset}) > 2, "rows are of one length"
        assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_of_tokens(trainer), rel=1e-5)


def test_a_router_adds_nothing_to_it(prompts, tmp_path):
    model = chat_model(tmp_path / "model", kind="Mixtral", num_hidden_layers=1, num_local_experts=4)
    changes = {"lora_target_modules": ".*q_proj", "router_aux_loss_coef": 0.5, "per_device_eval_batch_size": 3}
    trainer = trainer_of(model, prompts, tmp_path / "out", **changes)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(mean_of_tokens(trainer), rel=1e-5)
    assert trainer.router_aux_loss_coef == 0.5


def test_a_loss_that_is_no_number_is_not_left_out(prompts, tmp_path):
    model = chat_model(tmp_path / "model", num_hidden_layers=1)
    trainer = trainer_of(model, prompts, tmp_path / "out", per_device_eval_batch_size=1)
    spoilt = iter([True])
    trainer.model.get_base_model().model.norm.register_forward_hook(
        lambda module, args, output: output * float("nan") if next(spoilt, False) else output
    )
    assert math.isnan(trainer.evaluate()["eval_loss"])
    assert math.isfinite(trainer.evaluate()["eval_loss"])
