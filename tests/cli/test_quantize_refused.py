"""`nf4kernels quantize` on bad input, and what an interrupted run leaves."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama_directory import assert_only_input, command, tiny_llama, tree
from support.paths import ROOT

import nf4kernels as nf4
from nf4kernels.storage import convert
from nf4kernels.storage.atomic import TargetError, replacing_directory


def edit_tensors(change):
    def edit(in_dir):
        tensors = load_file(in_dir / "model.safetensors")
        change(tensors)
        save_file(tensors, in_dir / "model.safetensors")

    return edit


def truncate(in_dir):
    file = in_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit_config(**changes):
    def edit(in_dir):
        config = json.loads((in_dir / "config.json").read_text(encoding="utf-8"))
        (in_dir / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return edit


def odd_index(in_dir):
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (in_dir / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def set_nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


BAD_INPUT = {
    "truncated": (truncate, "model.safetensors must be a whole safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "path must have model.safetensors or its index"),
    "no config": (lambda d: (d / "config.json").unlink(), "IN_DIR must be a Hugging Face model directory"),
    "damaged config": (lambda d: (d / "config.json").write_text("{", encoding="utf-8"), "config.json must hold JSON"),
    "list config": (
        lambda d: (d / "config.json").write_text("[]", encoding="utf-8"),
        "config.json must hold a JSON object",
    ),
    "wrong config": (edit_config(num_attention_heads="many"), "config.json must describe a LlamaForCausalLM"),
    "quantized": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        "IN_DIR must hold a dense model, got one quantized by gptq",
    ),
    "odd index": (odd_index, "must list the tensors of its files"),
    "damaged index": (
        lambda d: (d / "model.safetensors.index.json").write_text("{", encoding="utf-8"),
        "must hold a weight_map in JSON",
    ),
    "nan": (edit_tensors(set_nan), r"layer model.layers.1.mlp.up_proj: .* weight must be finite, got nan at row 3"),
    "unknown layers": (
        edit_tensors(lambda t: [t.update({"x." + n: t.pop(n)}) for n in list(t)]),
        "IN_DIR|must have a linear layer to quantize, got none",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(case, in_dir, tmp_path, capsys):
    damage, message = BAD_INPUT[case]
    damage(in_dir)
    capsys.readouterr()
    assert command(in_dir, tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nf4kernels quantize: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert_only_input(tmp_path)


@pytest.mark.parametrize("value", [1e5, -7e4])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_value_that_does_not_fit_the_dtype_is_refused(name, value, in_dir, tmp_path, capsys):
    edit_tensors(lambda tensors: tensors[name].view(-1)[:1].fill_(value))(in_dir)
    assert command(in_dir, tmp_path / "out", "--dtype", "float16") == 2
    assert re.search(rf"quantize: {re.escape(name)} must fit float16 \(up to 65504\), got", capsys.readouterr().err)
    assert_only_input(tmp_path)


def test_what_fits_the_dtype_is_cast(in_dir, tmp_path):
    """The largest that does, and an inf that is in the file already."""
    edit_tensors(lambda tensors: tensors["model.norm.weight"][:2].copy_(torch.tensor([65280, torch.inf])))(in_dir)
    assert command(in_dir, tmp_path / "out", "--dtype", "float16") == 0
    out = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert out.dtype == torch.float16
    assert out[:2].tolist() == [65280, torch.inf]


def test_existing_output_needs_overwrite(in_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(in_dir, out, "--block-size", "128") == 0
    (out / "old file").write_text("", encoding="utf-8")
    before = tree(out)
    assert command(in_dir, out) == 2
    assert "OUT_DIR must not exist (or say --overwrite)" in capsys.readouterr().err
    assert tree(out) == before
    assert command(in_dir, out, "--overwrite") == 0
    assert tree(out) == [name for name in before if name != "old file"]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_overwrite_replaces_model_directories_only(in_dir, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("", encoding="utf-8")
    assert command(in_dir, tmp_path / "out", "--overwrite") == 2
    assert "must be a model directory to be overwritten" in capsys.readouterr().err
    assert tree(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("out", [".", "sub", ".."])
def test_output_is_not_the_input(out, in_dir, tmp_path, capsys):
    before = tree(tmp_path)
    assert command(in_dir, in_dir / out, "--overwrite") == 2
    assert "OUT_DIR must be outside IN_DIR" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_skip_that_matches_nothing_is_refused(in_dir, tmp_path, capsys):
    assert command(in_dir, tmp_path / "out", "--skip", "q_proj", "--skip", "qproj") == 2
    assert "--skip must match a layer, got 'qproj'" in capsys.readouterr().err
    assert_only_input(tmp_path)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_run_that_fails_half_way_leaves_nothing(error, overwrite, tmp_path, monkeypatch, capsys):
    tiny_llama(tmp_path / "in", "60KB")
    flags = ["--overwrite"] if overwrite else []
    if overwrite:
        assert command(tmp_path / "in", tmp_path / "out", "--codebook", "fp4") == 0
    before, original, written = tree(tmp_path), convert.write_tensors, []

    def fails_on_the_third(tensors, path, metadata=None):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"half")
            raise error
        original(tensors, path, metadata)

    monkeypatch.setattr(convert, "write_tensors", fails_on_the_third)
    assert command(tmp_path / "in", tmp_path / "out", *flags) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    message = "interrupted" if isinstance(error, KeyboardInterrupt) else "No space left on device"
    assert message in capsys.readouterr().err
    assert tree(tmp_path) == before
    monkeypatch.undo()
    assert command(tmp_path / "in", tmp_path / "out", *flags) == 0


KILLED = """
import sys, time
from nf4kernels.cli import main
from nf4kernels.storage import convert
original, written = convert.write_tensors, []
def stalls(tensors, path, metadata=None):
    original(tensors, path, metadata)
    written.append(path)
    if len(written) == 2:
        print("half way", flush=True)
        time.sleep(60)
convert.write_tensors = stalls
sys.exit(main(["quantize", *sys.argv[1:]]))
"""


def test_killed_run_leaves_no_output_and_the_next_one_cleans_up(tmp_path, capsys):
    tiny_llama(tmp_path / "in", "60KB")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "in", tmp_path / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "half way\n"
        assert command(tmp_path / "in", tmp_path / "out") == 2
        assert "must not be written by another run" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "in"]
    assert command(tmp_path / "in", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    nf4.load_checkpoint(tiny_llama(tmp_path / "again"), tmp_path / "out")


def test_overwrite_wants_a_model_and_not_any_config(in_dir, tmp_path, capsys):
    (tmp_path / "project" / "src").mkdir(parents=True)
    (tmp_path / "project" / "config.json").write_text("{}", encoding="utf-8")
    assert command(in_dir, tmp_path / "project", "--overwrite") == 2
    assert "OUT_DIR must be a model directory to be overwritten" in capsys.readouterr().err
    assert (tmp_path / "project" / "src").is_dir()


def test_output_that_cannot_be_made(in_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with (
        pytest.raises(TargetError, match="must be a path that can be made"),
        replacing_directory(tmp_path / "file" / "out"),
    ):
        pass
    assert command(in_dir, tmp_path / "file" / "out") == 2
    assert "OUT_DIR must be a path that can be made" in capsys.readouterr().err
