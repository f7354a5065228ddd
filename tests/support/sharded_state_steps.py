"""Run by torchrun on two ranks: what is saved, loaded and merged of sharded models. Prints "same: case"."""

import gc
import shutil
import sys
import weakref
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support import tiny
from support.fsdp_steps import shard
from support.sharded_models import LORA, dense, loss_of, made, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import nf4kernels as nf4
from nf4kernels.nn.dtensors import local_of
from nf4kernels.nn.quant_module import QuantModule
from nf4kernels.storage import sharded_save


def step(model: nn.Module) -> torch.Tensor:
    loss = loss_of(model, tiny.IDS)
    loss.backward()
    return loss.detach()


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
    if case == "kept after forward":
        step(model)
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


def pairs(case: str, directory: Path) -> None:
    """Two ranks of four hold a model of their own: they talk with each other alone, and save it by themselves."""
    pair = dist.get_rank() // 2
    mesh = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])][pair]
    plain, model, other = made(case), made(case), made(case)
    for each in (model, other):
        fully_shard(each, mesh=mesh)
    for parameter in other.parameters():
        parameter.detach().to_local().zero_()
    nf4.save_checkpoint(model, directory / f"of pair {pair}")
    nf4.load_checkpoint(other, directory / f"of pair {pair}")
    assert_same_state(other, plain)
    if pair == 0:  # nobody waits for the other two
        nf4.save_checkpoint(model, directory / "again")
        nf4.merge_model(model)


LAYERS, N, K = 16, 3072, 4096  # 100 MB in 4 bits, 403 MB in bf16


def memory(case: str, directory: Path) -> None:
    """Peak memory of a rank beyond what it had, file pages that it looks at included: never the whole model's."""
    dense_bytes, packed_bytes = 2 * LAYERS * N * K, LAYERS * N * K // 2
    if dist.get_rank() == 0:
        rows = torch.randn(N, 64, dtype=torch.bfloat16)
        save_file({f"{i}.weight": (rows * (i + 1)).repeat(1, K // 64) for i in range(LAYERS)}, directory / "dense")
    dist.barrier()
    first, second = big_on_meta(), big_on_meta()
    grown = {}
    with peak(grown, "quantize on load"):
        nf4.load_checkpoint(first, directory / "dense", quantize=True)
    with peak(grown, "save"):
        nf4.save_checkpoint(first, directory / "model")
    with peak(grown, "load"):
        nf4.load_checkpoint(second, directory / "model")
    for name, tensor in first.state_dict().items():
        assert torch.equal(local_of(tensor), local_of(second.state_dict()[name])), name
    with peak(grown, "merge"):
        nf4.merge_model(second)
    own = packed_bytes / dist.get_world_size()
    print(f"rank {dist.get_rank()}: {packed_bytes / 1e6:.0f} MB packed, {dense_bytes / 1e6:.0f} MB dense;",
          ", ".join(f"{what} {size / 1e6:.0f} MB" for what, size in grown.items()), flush=True)  # fmt: skip
    assert grown["save"] + own < packed_bytes
    assert grown["load"] < packed_bytes
    assert grown["quantize on load"] < packed_bytes
    assert grown["merge"] < dense_bytes


def big_on_meta() -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(K, N, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)])
        nf4.quantize_model(model, progress=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def resident(key: str) -> int:
    """Bytes, of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@contextmanager
def peak(grown: dict[str, int], what: str):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = resident("VmRSS")
    yield
    grown[what] = resident("VmHWM") - before


def refused(case: str, directory: Path) -> None:
    """What one rank cannot do, none does: the same sentence on every rank, no hang, and nothing is left behind."""
    model, rank = sharded(case), dist.get_rank()
    nf4.save_checkpoint(model, directory / "model")
    nf4.save_adapters(model, directory / "adapters")
    before = {name: tensor.clone() for name, tensor in local_state(model).items()}

    damaged = directory / f"of rank {rank}"
    shutil.copytree(directory / "model", damaged)
    if rank == 1:
        file = damaged / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    says(ValueError, "must be a whole safetensors file.*on rank 1 of 2", nf4.load_checkpoint, model, damaged)

    sizes, write = sharded_save.SMALLEST, sharded_save.write_tensors
    sharded_save.SMALLEST = 1  # many files, so that each rank has some
    if rank == 1:
        sharded_save.write_tensors = lambda *_: (_ for _ in ()).throw(OSError("No space left on device"))
    says(OSError, "No space left on device .on rank 1 of 2", nf4.save_checkpoint, model, directory / "model")
    assert sorted(each.name for each in directory.glob("*model*")) == ["model"], "the staging directory is left"
    sharded_save.write_tensors = write
    nf4.save_checkpoint(model, directory / "several")
    assert len(list((directory / "several").glob("*.safetensors"))) > 2
    nf4.load_checkpoint(model, directory / "several")
    sharded_save.SMALLEST = sizes

    taken = directory / "adapters" / "adapter_config.json"
    says(ValueError, "path must be a path that can be made", nf4.save_checkpoint, model, taken / "inside")
    says(ValueError, "path must be a directory for a sharded model", nf4.save_checkpoint, model, taken)
    says(ValueError, "holds a checkpoint alone, got adapter_config", nf4.save_checkpoint, model, taken.parent)
    says(OSError, "nf4kernels.save_adapters: .*[Nn]ot a directory", nf4.save_adapters, model, taken / "inside")

    alone = lambda path: nf4.save_checkpoint(model, path / f"of rank {rank}")  # noqa: E731
    says(ValueError, "all ranks of the model's mesh must have the same model and path", alone, directory / "two")
    assert not (directory / "two").exists()

    other = dense(case)
    other.requires_grad_(False)
    nf4.quantize_model(other, lora=nf4.LoraConfig(r=2), codebook="af4", progress=False)
    if rank == 0:
        nf4.save_checkpoint(other, directory / "af4.safetensors")
        dense(case).save_pretrained(directory / "dense")
        spoilt = dense(case)
        spoilt.model.layers[0].self_attn.q_proj.weight.data[-1, 3] = torch.nan  # a row of the second rank
        spoilt.save_pretrained(directory / "spoilt")
    dist.barrier()
    says(ValueError, "must have codebook nf4 as the model's layer, got af4", nf4.load_checkpoint, model,
         directory / "af4.safetensors")  # fmt: skip
    says(ValueError, "which quantize=True quantizes", nf4.load_checkpoint, model, directory / "dense")
    if case == "experts":
        return
    shard(other, case)
    says(ValueError, "of rank 4 when it was sharded .*, got rank 2", nf4.load_adapters, other, directory / "adapters")
    assert all(torch.equal(tensor, before[name]) for name, tensor in local_state(model).items()), "something changed"
    says(ValueError, "must be finite, got nan at row 31, column 3 .on rank 1", nf4.load_checkpoint, model,
         directory / "spoilt", quantize=True)  # fmt: skip


def local_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: local_of(tensor) for name, tensor in model.state_dict().items()}


def says(kind: type[Exception], pattern: str, call, *args, **options) -> None:
    """That the call raises on every rank, with one sentence."""
    with pytest.raises(kind, match=pattern) as caught:
        call(*args, **options)
    text = f"{caught.type.__name__}: {caught.value}"
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    assert len(set(texts)) == 1, texts
    assert "\n" not in text, text


CASES = {
    "memory": memory,
    "pairs": pairs,
    "placed": placed,
    "merge": merge,
    "save": save,
    "quantize": quantize_on_load,
    "refused": refused,
    "adapters": adapters,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    root = Path(sys.argv[1])
    for words in sys.argv[2:]:
        what, case = words.split(": ")
        directory = root / words.replace(": ", "-").replace(" ", "-")
        directory.mkdir(exist_ok=True)
        CASES[what](case, directory)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"same: {words}", flush=True)
    dist.destroy_process_group()
