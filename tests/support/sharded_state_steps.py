"""Run by torchrun on two ranks: what is saved, loaded and merged of sharded models. Prints "same: case"."""

import gc
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from support.sharded_steps import LORA, dense, made, shard, step, whole
from torch import nn

import nf4kernels as nf4
from nf4kernels.nn.quant_module import QuantModule


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
    other = quantized_on_meta(case, "to_empty" if case == "odd rows" else "meta")
    nf4.load_checkpoint(other, directory / "model")
    assert_same_state(other, plain)
    assert torch.equal(step(other), step(plain)), "the loss is another"


def quantized_on_meta(case: str, start: str) -> nn.Module:
    """Sharded before it has any values; buffers that no checkpoint holds are made as transformers makes them."""
    with torch.device("meta"):
        model = dense(case)
        model.requires_grad_(False)
        nf4.quantize_model(model, lora=LORA, progress=False)
    shard(model, case)
    if start == "to_empty":
        model.to_empty(device="cpu")
    values = dict(dense(case).named_buffers())
    for name, module in model.named_modules():
        for leaf in module._non_persistent_buffers_set:
            module._buffers[leaf] = values[f"{name}.{leaf}"]
    return model.train()


def quantize_on_load(case: str, directory: Path) -> None:
    """From a dense checkpoint, in the names and layout of save_pretrained; adapters start alike on all ranks."""
    plain = made(case)
    if dist.get_rank() == 0:
        dense(case).save_pretrained(directory)
    dist.barrier()
    model = quantized_on_meta(case, "meta" if case == "llama" else "to_empty")
    nf4.load_checkpoint(model, directory, quantize=True)
    state, expected = model.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        mine = whole(state[name])
        if "lora_" not in name:
            assert mine.dtype == tensor.dtype, name
            assert torch.equal(mine, tensor), f"{name} is another"
        else:
            assert mine.isfinite().all(), f"{name} has not started"
            assert mine.any() == ("lora_A" in name), f"{name} has not started"
    step(model)
    whole_too = plain if case == "tied" else made(case)
    nf4.load_checkpoint(whole_too, directory, quantize=True)
    for name, tensor in whole_too.state_dict().items():
        assert "lora_" in name or torch.equal(tensor, expected[name]), name


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


def merge(case: str, directory: Path) -> None:
    """Also after steps, with FSDP2's groups at work; the merged model is saved, and runs."""
    plain, model = made(case), sharded(case)
    if case != "odd rows":
        step(model)
    layers = [weakref.ref(module) for module in model.modules() if isinstance(module, QuantModule)]
    base = {"base": dense(case)} if case in ("odd rows", "experts") else {}
    names = nf4.merge_model(model, **base)
    assert names == nf4.merge_model(plain, **base)
    gc.collect()
    assert not any(layer() for layer in layers), "something keeps the packed bytes"
    assert_same_state(model, plain)
    packed = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8]
    assert not packed, packed
    nf4.save_checkpoint(model, directory / "model")
    again = dense(case)
    nf4.load_checkpoint(again, directory / "model")
    assert_same_state(again, plain)
    for _ in range(2):
        assert torch.equal(step(model), step(plain)), "the loss is another"


CASES = {"merge": merge, "save": save, "quantize": quantize_on_load, "adapters": adapters}


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
