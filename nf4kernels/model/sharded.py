"""Models whose tensors are DTensors: the part that this rank holds, the whole one, and ranks that go on together.

torch.distributed.tensor takes a third of a second to import. Whoever has a DTensor has imported it, so that its own
methods are enough here.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.dtensors import from_local, is_dtensor, local_of, whole
from ..nn.quant_module import SCALES

ERRORS = {error.__name__: error for error in (TypeError, ValueError, FileNotFoundError, PermissionError, OSError)}


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that torch's fully_shard was called with."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [each for each in model.modules() if isinstance(each, fsdp.FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold the model together, each a part of its parameters."""
    return any(map(is_dtensor, model.parameters())) or bool(fsdp_modules(model))


def check_whole(model: nn.Module, who: str, order: str) -> None:
    """ValueError where a linear layer's or experts' dense weight is sharded; `order`: what to do in which order."""
    sharded = bool(fsdp_modules(model))
    for module in model.modules() if not sharded else ():
        dense = [p for p in module._parameters.values() if p is not None and p.dtype != torch.uint8 and is_dtensor(p)]
        sharded = sharded or any(p.dim() == 3 or isinstance(module, nn.Linear) for p in dense)
    if sharded:
        raise ValueError(f"{who}: model must not be sharded yet ({order}), got layers whose parameters are DTensors")


def reshard(model: nn.Module) -> None:
    """Every parameter that FSDP2 has gathered and kept becomes this rank's part again."""
    for module in fsdp_modules(model):
        module.reshard()


def own_part(tensor: Any) -> tuple[slice, ...]:
    """Where in the whole tensor this rank's part lies."""
    if not is_dtensor(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    chunks = tensor.detach().__create_chunk_list__()  # the protocol of torch.distributed.checkpoint
    if len(chunks) != 1:
        raise ValueError(f"a rank must hold one part of a tensor, got {len(chunks)} as {tensor.placements} are cut")
    starts, sizes = chunks[0].offsets, chunks[0].sizes
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes))


def by_rows(tensor: Any) -> bool:
    """Whether every rank has whole rows of it, in one run: cut in the first dimension alone, or not at all."""
    if not is_dtensor(tensor):
        return True
    return all(p.is_replicate() or (type(p).__name__ == "Shard" and p.dim == 0) for p in tensor.placements)


class Ranks:
    """The processes that hold a model together. What one of them cannot do, none does: its error is everyone's.

    Every rank must come through the same calls in the same order. A rank that is gone ends the others' wait by the
    time-out of the process group. What FSDP2 has gathered of the model is sharded again.
    """

    def __init__(self, model: nn.Module, who: str) -> None:
        self.who, self.group = who, None
        self.rank, self.size = 0, 1
        reshard(model)
        dtensors: list[Any] = [tensor for tensor in model.parameters() if is_dtensor(tensor)]
        meshes = [tensor.device_mesh for tensor in dtensors]
        if not meshes:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"{who}: torch.distributed must be initialized for a sharded model, got no process group")
        members = sorted({rank for mesh in meshes for rank in _root(mesh).mesh.flatten().tolist()})
        if len(members) != dist.get_world_size():
            self.group = _group_of(tuple(members))
        self.rank, self.size = members.index(dist.get_rank()), len(members)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def of_first(self, value: Any) -> Any:
        return self.gathered(value if self.is_first else None)[0]

    def check_one_model(self, path: Path, names: Iterable[str]) -> None:
        """ValueError on every rank unless all have a model of these tensors to write to that path."""
        said = hashlib.sha256("\n".join([str(path), *names]).encode()).hexdigest()
        if len(set(self.gathered(said))) > 1:
            raise ValueError(
                f"{self.who}: all ranks of the model's mesh must have the same model and path, got others: models on"
                " slices of one mesh, as the stages of a pipeline are, must have a DeviceMesh of their own each"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what each rank does by itself, without a word to others: an error on one is raised on all."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        self.agree(failed)

    def agree(self, error: Exception | None) -> None:
        """Raise the first rank's error on every one."""
        outcomes = self.gathered(None if error is None else (_kind(error), str(error)))
        if self.size == 1 and error is not None and (type(error) is not ValueError or str(error).startswith(self.who)):
            raise error
        failed = [rank for rank, outcome in enumerate(outcomes) if outcome is not None]
        if not failed:
            return
        kind, text = outcomes[failed[0]]
        text = text if text.startswith(self.who) else f"{self.who}: {text}"
        where = "" if len(failed) == self.size else f" (on rank {failed[0]} of {self.size})"
        raise ERRORS.get(kind, RuntimeError)(f"{text}{where}") from error


def _kind(error: Exception) -> str:
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS), "RuntimeError")


def _root(mesh: Any) -> Any:
    """The mesh that this one was sliced from: a tensor-parallel part of a model lies on one of its rows."""
    root = getattr(mesh, "_get_root_mesh", None)
    return mesh if root is None else root()


_groups: dict[tuple[int, ...], Any] = {}


def _group_of(members: tuple[int, ...]) -> Any:
    """The process group of these ranks, which alone need to call."""
    if members not in _groups:
        _groups[members] = dist.new_group(list(members), use_local_synchronization=True)
    return _groups[members]


def gathered_qweight(layer: Any) -> Any:
    """The qweight of a layer in 4 bits, or of experts, of all ranks, on every one of them."""
    tensors = [whole(getattr(layer, name)) for name in ("weight", "absmax")]
    scales = {name: None if getattr(layer, name) is None else whole(getattr(layer, name)) for name in SCALES}
    values = {"shape": layer.weight_shape, "dtype": layer.original_dtype}
    names = {name: getattr(layer, name) for name in ("block_size", "codebook", "scale_codebook")}
    order = getattr(layer, "column_order", None)
    qweight = layer.QUANTIZED(*tensors, **scales, **values, **names)
    layer.compare_bytes(*tensors)
    return qweight if order is None else replace(qweight, column_order=order)


def copy_own_part(target: Tensor, values: Tensor) -> None:
    """Write this rank's part of the whole `values` into `target`."""
    with torch.no_grad():
        local_of(target).copy_(values[own_part(target)])


def placed_like(full: Tensor, like: Any) -> Any:
    """The DTensor of a whole tensor that every rank has, cut as `like` is and on its device; no rank waits."""
    if not is_dtensor(like):
        return full
    tensors: Any = sys.modules["torch.distributed.tensor"]
    mesh = like.device_mesh
    cut = tensors.distribute_tensor(full.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    return from_local(cut.to_local().to(local_of(like).device, copy=True), like, tuple(full.shape))
