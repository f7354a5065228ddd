"""Directories that bitsandbytes quantized, and those of `nf4kernels quantize`, straight into our layers."""

import json
import sys

import pytest
import torch
from support import tiny
from support.directories import dense_directory, load, logits, same_state, saved_by_bitsandbytes, transformers

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.integrations.transformers import Nf4Config, hooks


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    """As where it is not installed: neither transformers' question nor an import finds it."""
    monkeypatch.setattr(hooks, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_the_same_weights(tmp_path, family, double_quant, storage):
    dense = dense_directory(tmp_path / "dense", family)
    options = {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_quant_storage": storage}
    expected = saved_by_bitsandbytes(dense, tmp_path / "saved", **options)
    model = load(tmp_path / "saved", quantization_config=Nf4Config())
    layers = tiny.layers(model)
    assert layers.keys() == expected.keys() != set()
    assert all(torch.equal(layers[name].dequantize(torch.bfloat16), expected[name]) for name in layers)
    assert {layer.scale_codebook for layer in layers.values()} == {"dynamic8" if double_quant else None}
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text(encoding="utf-8"))["quantization_config"][
        "quant_method"
    ] == ("nf4kernels")
    assert same_state(load(tmp_path / "again"), model)


def test_without_bitsandbytes_nothing_need_be_said(tmp_path, without_bitsandbytes):
    assert main(["quantize", str(dense_directory(tmp_path / "dense")), str(tmp_path / "saved")]) == 0
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    model = load(tmp_path / "saved")
    expected = load(tmp_path / "dense", quantization_config=Nf4Config())
    assert same_state(model, expected)
    assert model.config.quantization_config.scale_codebook == "e4m3"
    assert model.num_parameters() == load(tmp_path / "dense").num_parameters()


def test_with_bitsandbytes_it_is_bitsandbytes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: it loads nothing")
    saved_by_bitsandbytes(dense_directory(tmp_path / "dense"), tmp_path / "saved")
    model = load(tmp_path / "saved")
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    count = load(tmp_path / "dense").num_parameters()
    assert model.num_parameters() == count


def test_fp4_and_other_block_sizes_must_be_asked_for(tmp_path, without_bitsandbytes):
    dense = str(dense_directory(tmp_path / "dense"))
    assert main(["quantize", dense, str(tmp_path / "fp4"), "--codebook", "fp4"]) == 0
    assert main(["quantize", dense, str(tmp_path / "128"), "--block-size", "128", "--no-double-quant"]) == 0
    with pytest.raises(ValueError, match=r"Nf4Config: codebook must be 'fp4' as the checkpoint has it, got 'nf4'"):
        load(tmp_path / "fp4", quantization_config=Nf4Config())
    with pytest.raises(ValueError, match=r"the checkpoint must have block size 64 as the configuration says, got 128"):
        load(tmp_path / "128", quantization_config=Nf4Config())
    for name, options in (("fp4", {"codebook": "fp4"}), ("128", {"block_size": 128})):
        model = load(tmp_path / name, quantization_config=Nf4Config(**options))
        assert same_state(model, load(tmp_path / name))


def test_experts_of_the_command_line(tmp_path):
    dense = dense_directory(tmp_path / "dense", "Mixtral")
    assert main(["quantize", str(dense), str(tmp_path / "saved")]) == 0
    model = load(tmp_path / "saved")
    assert isinstance(model.model.layers[0].mlp.experts, nf4.QuantExperts)
    assert same_state(model, load(dense, quantization_config=Nf4Config()))


def test_8_bits_are_refused(tmp_path):
    directory = dense_directory(tmp_path)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"Nf4Config: the checkpoint must be dense or in 4 bits, got bitsandbytes' 8"):
        load(directory, quantization_config=Nf4Config())


@pytest.mark.parametrize("asked", [None, "Nf4Config", "theirs"])
def test_other_methods_are_left_to_transformers(asked):
    stored = {"quant_method": "gptq", "bits": 4}
    config = {"Nf4Config": Nf4Config(), "theirs": transformers.GPTQConfig(bits=4)}.get(asked)
    assert hooks.our_config(stored, config) is (config if asked == "Nf4Config" else None)
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert hooks.our_config(stored, transformers.GPTQConfig(bits=4)) is None
