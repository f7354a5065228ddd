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


def test_ranks(directory, capsys):
    arguments = ["estimate", str(directory), "--length", "16", "--rank", "8", "--ranks", "1", "2", "16"]
    assert main([*arguments, "--link", "nvlink", "12.5"]) == 0
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[3:6] == ["ranks", "estimated", "simulated"]
    assert header.split()[-2:] == ["nvlink", "12.5"]
    assert [row.split()[3] for row in rows] == ["1", "2", "16"]
    assert [row.split()[-2] for row in rows] == ["0.00", "0.00", "-"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["ranks"] for each in told] == [each["estimate"]["gpus"] for each in told] == [1, 2, 16]
    assert told[2]["seconds"]["400g"] * 45e9 == pytest.approx(told[2]["sent"])
    assert told[2]["seconds"]["pcie5"] is None


def test_ranks_refused(directory, capsys):
    for more, sentence in (
        (["--ranks", "0"], "--ranks must be 1 or more, got 0"),
        (
            ["--ranks", "2", "--link", "string"],
            "--link must be one of nvlink, pcie5, 8x400g, 400g, 25g or a number of GB/s, got string",
        ),
    ):
        assert main(["estimate", str(directory), *more]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", f"nf4kernels estimate: {sentence}\n")
