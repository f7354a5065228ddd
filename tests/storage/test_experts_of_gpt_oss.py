"""A directory of gpt-oss to 4 bits: its transposed experts as quantize_model has them, read back by both loaders."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.directories import dense_directory, load, logits

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config
from nf4kernels.storage.convert import convert_directory
from nf4kernels.storage.directory_checks import ConversionError

transformers = tiny.transformers()


def model_of(directory, config):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    return model, type(model).__name__


def test_a_directory_of_gpt_oss(tmp_path):
    dense_directory(tmp_path / "dense", "gpt-oss")
    done = convert_directory(tmp_path / "dense", tmp_path / "4bit", model_of=model_of, progress=False)
    weights = [f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("down_proj", "gate_up_proj")]
    assert sorted(done.experts) == weights
    assert done.uneven == []
    expected = load(tmp_path / "dense")
    biases = {name: p.clone() for name, p in expected.named_parameters() if "experts" in name and name.endswith("bias")}
    nf4.quantize_model(expected, progress=False)
    by_transformers = load(tmp_path / "4bit", quantization_config=Nf4Config())
    filled = load(tmp_path / "dense")
    nf4.load_checkpoint(filled, tmp_path / "4bit")
    for model in (by_transformers, filled):
        assert isinstance(model.model.layers[0].mlp.experts, nf4.QuantExperts)
        assert torch.equal(logits(model), logits(expected))
        assert len(biases) == 4
        assert all(torch.equal(model.get_parameter(name), bias) for name, bias in biases.items())
    file = tmp_path / "4bit" / "model.safetensors"
    state = load_file(file)
    state[f"{weights[0]}.weight"][0, 0] ^= 1
    save_file(state, file, {"format": "pt"})
    dense = load(tmp_path / "dense")
    with pytest.raises(ValueError, match=rf"{weights[0]}.weight must hold the bytes that its checksum is of"):
        nf4.load_checkpoint(dense, tmp_path / "4bit")


def test_a_plan_names_the_experts_and_not_one_of_their_weights(tmp_path):
    dense_directory(tmp_path / "dense", "gpt-oss")
    plan = {"model.layers.0.mlp.experts.gate_up_proj": {"block_size": 128}}
    with pytest.raises(ConversionError, match=r"plan must name layers that can be quantized, got .*gate_up_proj"):
        convert_directory(tmp_path / "dense", tmp_path / "4bit", model_of=model_of, progress=False, plan=plan)
