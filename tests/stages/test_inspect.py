"""`nf4kernels inspect`: its numbers against the weights themselves, of dense and of 4-bit directories."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compared_model import small_model

import nf4kernels
from nf4kernels.cli import main
from nf4kernels.stages.inspect import decoded_scales, inspect_directory


@pytest.fixture
def directory(tmp_path):
    small_model(tmp_path / "model")
    return tmp_path / "model"


def change(directory, **tensors):
    """Rewrite some weights of the first layer's attention."""
    file = directory / "model.safetensors"
    stored = load_file(file)
    stored.update({f"model.layers.0.self_attn.{name}.weight": tensor for name, tensor in tensors.items()})
    save_file(stored, file, {"format": "pt"})


def of(inspection):
    return {layer.name: layer for layer in inspection.layers}


@pytest.mark.parametrize(
    "options", [("nf4", 64, True, "e4m3"), ("fp4", 128, False, "e4m3"), ("int4", 32, True, "dynamic8"), ("nvfp4",)]
)
def test_dense_numbers(directory, options):
    inspection = inspect_directory(directory, *options, progress=False)
    assert inspection.dense
    assert len(inspection.layers) == 14
    weights = load_file(directory / "model.safetensors")
    error = total = 0
    for layer in inspection.layers:
        weight = weights[f"{layer.name}.weight"]
        qweight = nf4kernels.quantize(weight, *options)
        decoded = nf4kernels.dequantize(qweight, torch.float32)
        error += (decoded - weight).double().square().sum().item()
        total += weight.double().square().sum().item()
        assert layer.rms_error == pytest.approx(((decoded - weight).norm() / weight.norm()).item(), rel=1e-4)
        assert (layer.shape, layer.bytes) == (tuple(weight.shape), qweight.nbytes)
        # The outermost level in magnitude times the scale is at most what a block decodes to.
        largest = decoded.view(-1, layer.block_size).abs().amax(1)
        assert layer.scales.max * qweight.code.abs().max().item() == pytest.approx(largest.max().item(), rel=1e-5)
        assert layer.scales.min <= layer.scales.p5 <= layer.scales.median <= layer.scales.p95 <= layer.scales.max
    assert inspection.rms_error == pytest.approx(math.sqrt(error / total), rel=1e-4)


@pytest.mark.parametrize("options", [(True, "e4m3"), (True, "dynamic8"), (False, "e4m3")])
def test_decoded_scales(options):
    """A weight whose every block is at its outermost level decodes to the scales."""
    qweight = nf4kernels.quantize(torch.rand(700, 1).expand(700, 64).contiguous(), "nf4", 64, *options)
    assert torch.equal(decoded_scales(qweight), nf4kernels.dequantize(qweight, torch.float32)[:, 0])


def test_zero_and_clipped_blocks(directory):
    weight = torch.randn(64, 64)
    weight[:16] = 0
    change(directory, q_proj=weight)
    exact = of(inspect_directory(directory, "nf4", 64, False, progress=False))["model.layers.0.self_attn.q_proj"]
    assert exact.zero_blocks == 0.25
    assert exact.clipped_blocks == 0
    double = of(inspect_directory(directory, "nf4", 64, True, progress=False))["model.layers.0.self_attn.q_proj"]
    qweight = nf4kernels.quantize(weight, "nf4", 64, True)
    clipped = weight.abs().amax(1) > decoded_scales(qweight)
    assert 0 < double.clipped_blocks < 1
    assert double.clipped_blocks == clipped.double().mean().item()


def test_four_bits_as_they_would_have_been(directory, tmp_path):
    """What `quantize` wrote has the scales and bytes that inspecting the dense model foretold."""
    assert main(["quantize", str(directory), str(tmp_path / "nf4")]) == 0
    dense, stored = (
        of(inspect_directory(directory, progress=False)),
        inspect_directory(tmp_path / "nf4", progress=False),
    )
    assert not stored.dense
    assert stored.rms_error is None
    assert "model.embed_tokens" in stored.left_dense
    assert [layer.name for layer in stored.layers] == list(dense)
    for layer in stored.layers:
        like = dense[layer.name]
        assert (layer.scales, layer.bytes, layer.zero_blocks) == (like.scales, like.bytes, like.zero_blocks)
        assert (layer.codebook, layer.block_size, layer.scale_kind) == ("nf4", 64, "double")
        assert layer.rms_error is None
        assert layer.clipped_blocks is None


def test_command(directory, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    assert main(["inspect", str(directory), "--plot", str(plot), "--json", "--codebook", "int4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dense"]
    assert len(result["layers"]) == 14
    assert {row["codebook"] for row in result["layers"]} == {"int4"}
    assert result["left_dense"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["quantize", str(directory), str(tmp_path / "nf4")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "nf4"), "--plot", str(tmp_path / "nf4.svg")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in out
    assert "all 14 layers" in out
    assert (tmp_path / "nf4.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_refused(directory, tmp_path, capsys):
    def error_of(*args):
        assert main(["inspect", *map(str, args)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("nf4kernels inspect: ")
        return error.splitlines()[-1]

    assert "DIR must be a Hugging Face model directory" in error_of(tmp_path)
    assert "block_size must be 32 with codebook='mxfp4', got 64" in error_of(
        directory, "--codebook", "mxfp4", "--block-size", "64"
    )
    assert "--plot must end with" in error_of(directory, "--plot", tmp_path / "plot")
    assert "DIR must have a linear layer to quantize, got none" in error_of(directory, "--skip", "model")
    assert "--skip must match a layer, got 'absent'" in error_of(directory, "--skip", "absent")
    weight = torch.ones(64, 64)
    weight[3, 5] = math.nan
    change(directory, q_proj=weight)
    (tmp_path / "here").mkdir()
    assert main(["inspect", str(directory), "--plot", str(tmp_path / "here" / "plot.png")]) == 2
    error = capsys.readouterr().err
    assert "layer model.layers.0.self_attn.q_proj: weight must be finite, got nan at row 3, column 5" in error
    assert not list((tmp_path / "here").iterdir())
    (directory / "model.safetensors").write_bytes(b"damaged")
    assert "must be a whole safetensors file" in error_of(directory)
