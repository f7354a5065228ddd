"""convert_directory called by a program: names decide without a model, and errors use the arguments' own names."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import nf4kernels as nf4
from nf4kernels.storage.convert import convert_directory
from nf4kernels.storage.directory_checks import ConversionError


@pytest.fixture
def in_dir(tmp_path):
    (tmp_path / "in").mkdir()
    tensors = {"a.weight": torch.randn(8, 64), "embed.weight": torch.randn(4, 64), "a.bias": torch.randn(8)}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "in"


def test_names_decide_without_a_model(in_dir, tmp_path, capsys):
    done = convert_directory(in_dir, tmp_path / "out", block_size=32, progress=False)
    assert done.choice.layers == ["a"]
    assert done.choice.source == "their names"
    assert done.uneven == []
    before = load_file(in_dir / "model.safetensors")
    expected = nf4.weight_to_tensors(nf4.quantize(before["a.weight"], block_size=32), "a.weight")
    expected |= {name: before[name] for name in ("embed.weight", "a.bias")}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConversionError, r"out_dir must not exist \(or say overwrite=True\)"),
        ({"skip": ["q"]}, ConversionError, "skip must match a layer, got 'q'"),
        ({"skip": ["a"]}, ConversionError, r"in must have a linear layer to quantize, got none \(their names\)"),
        ({"codebook": "int4"}, ValueError, "codebook must be 'nf4' or 'fp4'"),
        ({"block_size": 48}, ValueError, "block_size must be one of"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32, bfloat16, float16 or None, got torch.int8"),
    ],
)
def test_bad_arguments_write_nothing(options, error, message, in_dir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=message):
        convert_directory(in_dir, tmp_path / "out", progress=False, **options)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert os.listdir(tmp_path / "out") == []
