"""From a file of examples to a model that answers, by commands alone, each a process of its own in an empty folder."""

import json
import os
import subprocess
import sys

import pytest
from support import smollm2
from support.chat_model import facts
from support.paths import python_path

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")


@pytest.mark.slow
def test_every_stage_by_its_command(tmp_path):
    model = str(smollm2.directory())
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str, typed: str = "") -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "nf4kernels", *arguments], cwd=folder, env=environment, input=typed,
            capture_output=True, encoding="utf-8", timeout=300,
        )  # fmt: skip
        assert ran.returncode == 0, f"{arguments}: {ran.stderr[-1500:]}"
        return ran.stdout

    asked = [{"prompt": question, "completion": answer} for question, answer in facts(48)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    (folder / "held.txt").write_text("\n".join(q + " " + a for q, a in facts(64)[48:]), encoding="utf-8")

    assert "48 examples" in run("data", "check", "data.jsonl", "--model", model)
    (estimated,) = json.loads(run("estimate", model, "--batch", "4", "--length", "64", "--rank", "8", "--json"))
    assert estimated["train"] > estimated["load"] - estimated["largest"] > 0
    assert json.loads(run("inspect", model, "--json"))
    compared = json.loads(
        run("compare", model, "--text", "held.txt", "--tokens", "128", "--codebooks", "nf4", "--json")
    )
    assert compared["tokens"] == 128
    assert "cpu-small" in run("recipes")
    run("recipes", "copy", "cpu-small", "recipe.yaml")
    said = run(
        "finetune", "--config", "recipe.yaml", "--model", model, "--data", "data.jsonl", "--output_dir", "tuned",
        "--max_steps", "8", "--learning_rate", "3e-3", "--dtype", "float32",
    )  # fmt: skip
    before, after = (float(said.split(f"loss {when}: ")[1].split()[0]) for when in ("before", "after"))
    assert after < before
    chat = ("--temperature", "0", "--max-new-tokens", "8")
    tuned = run("chat", "tuned", *chat, typed=f"{facts(1)[0][0]}\n")
    assert tuned.strip()

    run("merge", "tuned", "merged")
    assert run("chat", "merged", "--dense", *chat, typed=f"{facts(1)[0][0]}\n").strip()
    run("quantize", "merged", "ours")
    assert json.loads(run("inspect", "ours", "--json"))
    run("export", "merged", "shards", "--to", "safetensors", "--max-shard-size", "100KB")
    run("export", "ours", "bitsandbytes", "--to", "bitsandbytes")
    run("export", "tuned", "adapter", "--to", "peft")
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == sorted(
        ["data.jsonl", "held.txt", "recipe.yaml", "tuned", "merged", "ours", "shards", "bitsandbytes",
         "adapter"]
    )  # fmt: skip
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
