"""Distributed training: replicas that run twice a step under checkpointing, and shards of parameters."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from support import tiny
from support.paths import python_path
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import nf4kernels as nf4

CONFIG = nf4.LoraConfig(r=4, init="gaussian")
X = torch.linspace(-1, 1, 4 * 64).view(4, 64)


class Checkpointed(nn.Module):
    """Each layer under checkpoint, and called twice a forward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) + x
        return x


def made():
    torch.manual_seed(0)
    model = Checkpointed()
    model.requires_grad_(False)
    nf4.quantize_model(model, lora=CONFIG, progress=False)
    return tiny.fill_adapters(model)


def gradients(model):
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def gloo(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static graph"])
def test_ddp_with_two_forwards_and_checkpointing(gloo, static):
    """Report's kind: "expected to mark a variable ready only once"."""
    plain = made()
    (plain(X).square().mean() + plain(2 * X).square().mean()).backward()
    ddp = DistributedDataParallel(made(), static_graph=static)
    (ddp(X).square().mean() + ddp(2 * X).square().mean()).backward()
    expected, got = gradients(plain), gradients(ddp)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[n], got[n]) for n in expected)


TWO_RANKS = """
    import os, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from model.test_distributed import X, gradients, made
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=2)
    model = made()
    if rank:
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    p.zero_()  # DDP broadcasts rank 0's
    ddp = DistributedDataParallel(model, static_graph=True)
    half = X[2 * rank : 2 * rank + 2]
    (ddp(half).square().mean() + ddp(2 * half).square().mean()).backward()
    plain = made()
    (plain(X).square().mean() + plain(2 * X).square().mean()).backward()
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(ddp)[name], expected, rtol=1e-3, atol=1e-4)
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_of_two_processes(tmp_path):
    """The same of two, which start from different values."""
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(TWO_RANKS), str(rank)], cwd=tmp_path, env=environment,
                         stderr=subprocess.PIPE, encoding="utf-8")
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        assert process.wait(120) == 0, process.stderr.read()[-800:]


def test_fsdp2_gives_the_same_numbers(gloo):
    """Report's kind: fully_shard of uint8 parameters beside floating-point ones."""
    plain, sharded = made(), made()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for _ in range(2):
        for model in (plain, sharded):
            model.zero_grad()
            model(X).square().mean().backward()
        expected, got = gradients(plain), gradients(sharded)
        assert expected.keys() == got.keys()
        for name in expected:
            assert torch.equal(got[name].full_tensor(), expected[name]), name
    state = sharded.state_dict()
    for name, expected in plain.state_dict().items():
        got = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
        assert torch.equal(got, expected), f"{name}, after shards were gathered"
