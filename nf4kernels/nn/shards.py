"""What a state dict has of a layer whose weight is sharded: buffers that are whole on every rank, as DTensors."""

from typing import Any

from torch import Tensor


def is_shard(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, without the third of a second that it takes to import them."""
    return hasattr(tensor, "to_local")


def replicated(tensor: Tensor, sharded: Any) -> Tensor:
    """`tensor`, the same on every rank, as a DTensor on the mesh of `sharded`."""
    from torch.distributed.tensor import DTensor, Replicate  # there is a DTensor, so it is imported by now

    mesh = sharded.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def whole(tensor: Any) -> Tensor:
    """The tensor that a DTensor stands for; any other as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor
