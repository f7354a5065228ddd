"""Run by torchrun on two ranks: what is saved, loaded and merged of sharded models. Prints "same: case"."""

import gc
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from support.sharded_steps import LORA, dense, made, shard, step, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

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
        is_unknown = name.endswith("checksum") and not mine.any()  # of bytes that are cut by columns
        assert is_unknown or torch.equal(mine, tensor), f"{name} is another"


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
    other, other_plain = sharded(case), made(case)
    nf4.merge_model(other, base=dense(case), dtype=torch.bfloat16)
    nf4.merge_model(other_plain, base=dense(case), dtype=torch.bfloat16)
    assert_same_state(other, other_plain)
    layers = [weakref.ref(module) for module in model.modules() if isinstance(module, QuantModule)]
    names = nf4.merge_model(model)
    assert names == nf4.merge_model(plain)
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


def placed(case: str, directory: Path) -> None:
    """Parameters cut otherwise than FSDP2 does: by columns, by both dimensions of a mesh, held by every rank."""
    plain, model, empty = made(case), made(case), made(case)
    for each in (model, empty):
        cut_by_hand(each)
    for parameter in empty.parameters():
        parameter.detach().to_local().zero_()
    assert_same_state(model, plain)
    nf4.save_checkpoint(model, directory / "model")
    nf4.load_checkpoint(empty, directory / "model")
    assert_same_state(empty, plain)
    if dist.get_rank() == 0:
        dense(case).save_pretrained(directory / "dense")
    dist.barrier()
    nf4.load_checkpoint(empty, directory / "dense", quantize=True)
    expected = plain.state_dict()
    for name, tensor in empty.state_dict().items():
        unknown = name.endswith("checksum") and not tensor.any()
        assert "lora_" in name or unknown or torch.equal(whole(tensor), expected[name]), name
    nf4.save_adapters(model, directory / "adapters")
    nf4.load_adapters(empty, directory / "adapters")
    nf4.merge_model(empty)
    nf4.merge_model(plain)
    assert_same_state(empty, plain)


def cut_by_hand(model: nn.Module) -> None:
    ranks = dist.get_world_size()
    row = init_device_mesh("cpu", (ranks,))
    grid = init_device_mesh("cpu", (2, ranks // 2))
    choices = [(row, [Shard(0)]), (row, [Shard(1)]), (row, [Replicate()]), (grid, [Replicate(), Shard(0)]),
               (grid, [Shard(0), Shard(1)])]  # fmt: skip
    for index, module in enumerate(model.modules()):
        mesh, placements = choices[index % len(choices)]
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            fitting = placements if parameter.dim() > 1 else [Replicate()] * mesh.ndim
            cut = distribute_tensor(parameter.data, mesh, fitting)
            module._parameters[leaf] = nn.Parameter(cut, parameter.requires_grad)


CASES = {"placed": placed, "merge": merge, "save": save, "quantize": quantize_on_load, "adapters": adapters}


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
