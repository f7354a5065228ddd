"""torch.distributed.checkpoint on models in 4 bits: saved on two ranks, gone on with on one, two and four."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import checkpoint_steps
from support.paths import python_path
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import nf4kernels as nf4


@pytest.mark.slow
def test_a_state_saved_on_two_ranks_goes_on_on_any_number(tmp_path):
    """The same losses and packed bytes, optimizer included, into a model of other bytes, which the guard lets pass."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, str(Path(checkpoint_steps.__file__)), str(tmp_path), *checkpoint_steps.CASES], cwd=tmp_path,
        env=environment, capture_output=True, encoding="utf-8", timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = [line for line in ran.stdout.splitlines() if line.startswith("same")]
    assert said == [f"same: {case}" for case in checkpoint_steps.CASES]


def layer(seed: int, **options) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nf4.QuantLinear.from_linear(nn.Linear(128, 64, bias=False), **options))


@pytest.fixture
def x():
    return torch.randn(3, 128)


def test_a_load_in_place_brings_its_checksum(tmp_path, x):
    """dcp.load writes into the layer's own tensors, whose bytes have been seen: the guard takes them with theirs."""
    saved, layers = layer(0), layer(1)
    dcp.save(get_model_state_dict(saved), checkpoint_id=tmp_path)
    assert not torch.equal(layers(x), saved(x))
    held = layers[0].weight.data_ptr()
    dcp.load(layers.state_dict(), checkpoint_id=tmp_path)
    assert layers[0].weight.data_ptr() == held
    assert torch.equal(layers(x), saved(x))
    dcp.load(layers.state_dict(), checkpoint_id=tmp_path)  # the same bytes again
    assert torch.equal(layers(x), saved(x))


def test_a_load_in_place_of_bytes_alone_is_noticed(tmp_path, x):
    """Without their checksum they might be anything."""
    layers = layer(1)
    dcp.save({"0.weight": layer(0).state_dict()["0.weight"]}, checkpoint_id=tmp_path)
    layers(x)
    dcp.load({"0.weight": layers.state_dict()["0.weight"]}, checkpoint_id=tmp_path)
    with pytest.raises(RuntimeError, match="got bytes that were changed in place"):
        layers(x)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"block_size": 128}, "mismatch .* 0.absmax"),
        ({"codebook": "af4"}, "0.code must be the nf4 codebook"),
        ({"double_quant": False}, "Missing key .* 0.scale_absmax"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused_by_name(tmp_path, options, expected):
    dcp.save(get_model_state_dict(layer(0, **options)), checkpoint_id=tmp_path)
    layers = layer(1)

    def load() -> None:
        state = get_model_state_dict(layers)
        dcp.load(state, checkpoint_id=tmp_path)
        set_model_state_dict(layers, state)

    with pytest.raises((RuntimeError, dcp.api.CheckpointException), match=expected):
        load()
