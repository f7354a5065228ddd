"""DTensors in the state of a layer, told and made without the third of a second that it takes to import them."""

from typing import Any

from torch import Tensor


def is_shard(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def replicated(tensor: Tensor, sharded: Any) -> Tensor:
    """`tensor`, the same on every rank, as a DTensor on the mesh of `sharded`; without placements it is replicated."""
    return type(sharded).from_local(tensor, sharded.device_mesh, run_check=False)


def whole(tensor: Any) -> Tensor:
    """The tensor that a DTensor stands for; any other as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor
