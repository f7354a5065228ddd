"""Run by torchrun on two ranks: what is saved, loaded and merged of sharded models. Prints "same: case"."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support import tiny
from support.sharded_steps import LORA, dense, made, shard, whole
from torch import nn

import nf4kernels as nf4


def sharded(case: str) -> nn.Module:
    model = made(case)
    shard(model, case)
    return model


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    state, theirs = got.state_dict(), expected.state_dict()
    assert state.keys() == theirs.keys(), state.keys() ^ theirs.keys()
    for name, tensor in theirs.items():
        mine = whole(state[name])
        assert mine.dtype == tensor.dtype, name
        assert torch.equal(mine, tensor), f"{name} is another"


def save(case: str, directory: Path) -> None:
    """The checkpoint, read into one process, is the unsharded model; and so is a part of it on each rank."""
    plain, model = made(case), sharded(case)
    nf4.save_checkpoint(model, directory / "model")
    again = dense(case)
    nf4.load_checkpoint(again, directory / "model")
    assert_same_state(again, plain)


def adapters(case: str, directory: Path) -> None:
    plain, model = made(case), sharded(case)
    nf4.save_adapters(model, directory / "sharded")
    if dist.get_rank() == 0:
        nf4.save_adapters(plain, directory / "plain")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (directory / "sharded" / name).read_bytes() == (directory / "plain" / name).read_bytes(), name
    other = made(case)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    shard(other, case)
    nf4.load_adapters(other, directory / "sharded")
    assert_same_state(other, plain)


CASES = {"save": save, "adapters": adapters}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    root = Path(sys.argv[1])
    for words in sys.argv[2:]:
        what, case = words.split(": ")
        directory = root / words.replace(": ", "-").replace(" ", "-")
        CASES[what](case, directory)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"same: {words}", flush=True)
    dist.destroy_process_group()
