"""`nf4kernels estimate`, run as a user does."""

import json

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from nf4kernels.cli import main

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return tmp_path


def test_table(directory, capsys):
    assert main(["estimate", str(directory), "--batch", "1", "4", "--length", "16", "--rank", "8"]) == 0
    printed = capsys.readouterr().out
    assert "24 GB: training fits, serving fits" in printed
    assert len([line for line in printed.splitlines() if line.endswith("both")]) == 2


def test_json(directory, capsys):
    file = str(directory / "config.json")
    assert main(["estimate", file, "--gpus", "2", "--shard", "zero3", "--length", "16", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["gpus"] == 2
    assert told["train_fits_gib"] == [24, 48, 80]
    assert told["train"] > told["weights"] > 0


def test_refused(directory, capsys):
    assert main(["estimate", str(directory), "--rank", "0"]) == 2
    assert capsys.readouterr().err == "nf4kernels estimate: --rank must be 1 or more, got 0\n"
    (directory / "config.json").write_text("{", encoding="utf-8")
    assert main(["estimate", str(directory)]) == 2
    assert "config.json must be JSON" in capsys.readouterr().err
