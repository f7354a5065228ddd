"""`nf4kernels merge`: its base, its question, its messages."""

import io
import json
import os

import pytest
from support.llama_directory import all_tensors
from support.peft_adapter import merged_by_peft, save_adapter, torch

from nf4kernels.cli import main


@pytest.fixture
def adapter(in_dir, tmp_path):
    return save_adapter(in_dir, tmp_path / "adapter")


def merge(*args):
    return main(["merge", *map(str, args)])


def test_finds_the_base_that_the_adapter_names(adapter, in_dir, tmp_path, capsys):
    assert merge(adapter, tmp_path / "out", "--max-shard-size", "50KB") == 0
    assert f"merged the adapter's 4 layers into the weights of {in_dir}" in capsys.readouterr().out
    expected = merged_by_peft(in_dir, adapter).state_dict()
    found = all_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_base_that_is_not_here(adapter, tmp_path, capsys):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": "no/such-model"}), encoding="utf-8")
    assert merge(adapter, tmp_path / "out") == 2
    assert "must be a model directory on this machine, got 'no/such-model' (give its directory with --base)" in (
        capsys.readouterr().err
    )
    assert merge(adapter, tmp_path / "out", "--base", tmp_path / "gone") == 2
    assert "merge: --base must be a model directory on this machine" in capsys.readouterr().err
    assert merge(tmp_path / "nothing", tmp_path / "out") == 2
    assert "merge: ADAPTER must be a directory of PEFT's" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["adapter", "in"]


def test_an_existing_output(adapter, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert merge(adapter, tmp_path / "out") == 2
    assert "nf4kernels merge: OUT must not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "answer", "code"), [
    (["--yes"], None, 0), ([], "yes\n", 0), ([], "y\n", 2), ([], "\n", 2), ([], None, 2),
])  # fmt: skip
def test_4_bits_show_their_cost_and_want_a_yes(flags, answer, code, adapter, tmp_path, monkeypatch, capsys):
    stdin = io.StringIO(answer or "")
    stdin.isatty = lambda: answer is not None
    monkeypatch.setattr("sys.stdin", stdin)
    assert merge(adapter, tmp_path / "out", "--into", "4bit", *flags) == code
    said = capsys.readouterr()
    assert "all measured layers" in said.out
    assert "(4 layers)" in said.out
    assert (tmp_path / "out").exists() == (code == 0)
    if code:
        assert "nothing was written" in said.err
    else:
        assert any("quant_state.bitsandbytes__nf4" in name for name in all_tensors(tmp_path / "out"))
