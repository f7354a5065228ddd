"""`nf4kernels finetune` on a mixture of experts logs how evenly its router deals tokens."""

import csv

import pytest
from support.chat_model import chat_model, facts
from support.finetune_run import STEPS, arguments, write_rows

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

from nf4kernels.cli import main  # noqa: E402


@pytest.mark.slow
def test_the_log_of_a_mixture_has_its_balance(tmp_path):
    E = 4
    model = chat_model(
        tmp_path / "model", kind="Mixtral", num_hidden_layers=1, num_local_experts=E, num_experts_per_tok=1
    )
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": q, "completion": a} for q, a in facts(32)])
    assert main(arguments(model, prompts, tmp_path / "out", lora_target_modules=".*q_proj")) == 0
    with (tmp_path / "out" / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["loss"]]
    assert len(trained) == STEPS
    loads = [float(row["expert_load_max"]) for row in trained]
    assert all(1 <= load <= E for load in loads)
    assert len(set(loads)) > 1, "it is not counted anew"
    assert all(0 <= float(row["experts_idle"]) < 1 for row in trained)
