"""`nf4kernels merge --into 4bit --text`: the losses that it shows are those of the models, and then it asks."""

import io
import os
import re

import pytest
import torch
from support.chat_model import chat_model, facts
from support.llama_directory import tree
from support.peft_adapter import merged_by_peft, save_adapter, transformers

from nf4kernels.cli import main
from nf4kernels.integrations.transformers import Nf4Config
from nf4kernels.stages.errors import StageError
from nf4kernels.stages.merge import losses_with_adapter, tokenized_text

ROWS = ("the base alone", "with the adapter", "merged into 4 bits")


def merge(*args):
    return main(["merge", *map(str, args)])


@pytest.fixture
def adapter(tmp_path):
    chat_model(tmp_path / "base")
    return save_adapter(tmp_path / "base", tmp_path / "adapter", scale=0.3)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{question} {answer}" for question, answer in facts()), encoding="utf-8")
    return file


def shown(output):
    """The three losses of the table."""
    return [float(re.search(rf"{row} +(\d+\.\d+)", output)[1]) for row in ROWS]


def loss_of(model, tokenizer, text, tokens):
    """By transformers' own loss of the first tokens of a text, one window."""
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, : tokens + 1]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("codebook", [None, "nf4", "fp4"])
def test_the_losses_of_the_three_models(codebook, adapter, text, tmp_path, capsys):
    base, flags, load = tmp_path / "base", [], transformers.AutoModelForCausalLM.from_pretrained
    if codebook is not None:
        assert main(["quantize", str(base), str(tmp_path / "packed"), "--codebook", codebook]) == 0
        flags = ["--base", tmp_path / "packed"]
    capsys.readouterr()
    assert merge(adapter, tmp_path / "out", "--into", "4bit", "--text", text, "--tokens", "200", "--yes", *flags) == 0
    said = capsys.readouterr().out
    assert f"The loss on 200 tokens of {text}, in nats a token:" in said
    assert said.index("merged into 4 bits") < said.index("all measured layers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    options = {} if codebook is None else {"quantization_config": Nf4Config(codebook=codebook)}
    models = [load(base, **options), merged_by_peft(base, adapter)]
    models.append(load(tmp_path / "out", quantization_config=Nf4Config(codebook=codebook or "nf4")))
    if codebook is not None:
        models[1] = transformers.AutoModelForCausalLM.from_pretrained(base, **options)
        models[1].load_adapter(str(adapter))
    expected = [loss_of(model.eval(), tokenizer, text, 200) for model in models]
    assert shown(said) == pytest.approx(expected, abs=2e-4)
    assert len({round(loss, 3) for loss in expected}) == 3


@pytest.mark.parametrize(("answer", "code"), [("yes\n", 0), ("no\n", 2), (None, 2)])
def test_it_asks_when_the_losses_are_known(answer, code, adapter, text, tmp_path, monkeypatch, capsys):
    stdin = io.StringIO(answer or "")
    stdin.isatty = lambda: answer is not None
    monkeypatch.setattr("sys.stdin", stdin)
    before = sorted(os.listdir(tmp_path))
    assert merge(adapter, tmp_path / "out", "--into", "4bit", "--text", text, "--tokens", "50") == code
    said = capsys.readouterr()
    assert len(shown(said.out)) == 3
    assert sorted(os.listdir(tmp_path)) == sorted([*before, *(["out"] if code == 0 else [])])
    if code:
        assert "nothing was written" in said.err


def test_refused_before_anything_is_written(adapter, text, tmp_path, capsys):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    before = tree(tmp_path)
    capsys.readouterr()
    for name, message in (
        ("bytes.txt", "bytes.txt must be UTF-8, got"),
        ("empty.txt", "empty.txt must hold text, got an empty file"),
        ("lines.jsonl", 'lines.jsonl line 1: must be an object with a string "text", got'),
        ("gone.txt", "--text must be a file that can be read, got"),
    ):
        assert merge(adapter, tmp_path / "out", "--into", "4bit", "--text", tmp_path / name, "--yes") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("nf4kernels merge: ")
        assert message in line
    assert merge(adapter, tmp_path / "out", "--into", "4bit", "--text", text, "--tokens", "0", "--yes") == 2
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err
    assert merge(adapter, tmp_path / "out", "--text", text) == 2
    assert "--text must be left out but for --into 4bit, got --into base" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_an_adapter_of_another_model(adapter, text, tmp_path):
    chat_model(tmp_path / "other", hidden_size=32)
    with pytest.raises(StageError, match=r"the adapter .* must fit .*other: "):
        losses_with_adapter(tmp_path / "other", adapter, tokenized_text(text, tmp_path / "base", adapter))
