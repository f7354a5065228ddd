"""int8 in Hugging Face directories: on load, saved, written by the command line, and beside layers in 4 bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.directories import dense_directory, load, logits, same_state

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.integrations.transformers import Nf4Config
from nf4kernels.storage.convert import convert_directory
from nf4kernels.storage.directory_checks import ConversionError


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_loaded_and_saved(tmp_path, family):
    directory = dense_directory(tmp_path / "dense", family)
    expected = load(directory)
    nf4.quantize_model(expected, codebook="int8", progress=False)
    model = load(directory, quantization_config=Nf4Config(codebook="int8"))
    assert same_state(model, expected)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert same_state(again, expected)
    assert torch.equal(logits(again), logits(expected))


def test_quantize_on_the_command_line(tmp_path, capsys):
    directory, out = dense_directory(tmp_path / "dense"), tmp_path / "out"
    assert main(["quantize", str(directory), str(out), "--codebook", "int8"]) == 0
    assert "bitsandbytes has no such 8-bit format" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (config["quant_method"], config["codebook"]) == ("nf4kernels", "int8")
    expected = load(directory)
    nf4.quantize_model(expected, codebook="int8", progress=False)
    assert torch.equal(logits(load(out)), logits(expected))
    loaded = load(directory)
    nf4.load_checkpoint(loaded, out)
    assert torch.equal(logits(loaded), logits(expected))


def test_a_mixed_model_is_saved_and_read(tmp_path):
    directory = dense_directory(tmp_path / "dense")
    model = load(directory)
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    plan = {name: {"codebook": "int8"} for name in names[::3]} | {names[1]: None}
    nf4.quantize_model(model, plan=plan, progress=False)
    assert {layer.codebook for layer in tiny.layers(model).values()} == {"nf4", "int8"}
    nf4.save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load(directory)
    nf4.load_checkpoint(loaded, tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded), logits(model))
    states = {name.rpartition("__")[2] for name in load_file(tmp_path / "model.safetensors") if ".quant_state." in name}
    assert states == {"nf4", "int8"}


def test_another_codebook_is_still_refused(tmp_path):
    directory = dense_directory(tmp_path / "dense")
    with pytest.raises((ValueError, ConversionError), match="must be 'nf4' or 'fp4' in bitsandbytes' format"):
        convert_directory(directory, tmp_path / "out", codebook="af4", progress=False)
