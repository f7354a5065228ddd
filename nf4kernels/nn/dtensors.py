"""DTensors: told, made and gathered without the third of a second that it takes to import them.

Whoever has a DTensor has imported them, so that its own methods are enough here.
"""

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all ranks, on every one of them; every rank of its mesh must call."""
    if not is_dtensor(tensor):
        return tensor.detach()
    tensor = tensor.detach()
    sharded: Any = tensor
    local, device = sharded.to_local(), sharded.device_mesh.device_type
    if local.device.type not in (device, "meta"):  # offloaded: the mesh's ranks talk on their devices
        sharded = from_local(local.to(device), tensor)
    full: Tensor = sharded.full_tensor()
    return full


def placed_as(tensor: Tensor, own: Any) -> Tensor:
    """The tensor, on every rank or in parts, as `own` is placed; without `own`, or where that is no DTensor, whole."""
    if not is_dtensor(own):
        return whole(tensor)
    if is_dtensor(tensor):
        return tensor
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    placed: Tensor = distribute(tensor, own.device_mesh, own.placements, src_data_rank=None)
    return placed


def local_of(tensor: Any) -> Tensor:
    """This rank's part itself, or a tensor that is not sharded."""
    local: Tensor = tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()
    return local


def from_local(local: Tensor, like: Any, shape: tuple[int, ...] | None = None) -> Any:
    """The DTensor of which `local` is this rank's part, placed as `like` is, and of its shape unless one is given."""
    sizes = torch.Size(shape or like.shape)
    stride = torch.empty(sizes, device="meta").stride()
    return type(like.detach()).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=sizes, stride=stride
    )  # fmt: skip


def replicated(tensor: Tensor, sharded: Any) -> Tensor:
    """`tensor`, the same on every rank, as a DTensor on the mesh of `sharded`; without placements it is replicated."""
    return type(sharded).from_local(tensor, sharded.device_mesh, run_check=False)
