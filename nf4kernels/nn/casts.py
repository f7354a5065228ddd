"""Casts to a narrower dtype that lose no finite value to infinity."""

import torch
from torch import Tensor


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """tensor in dtype; ValueError that names the tensor where a finite value would become infinite."""
    out = tensor.to(dtype)
    if out is tensor or not _can_overflow(tensor, dtype) or all(bound.isfinite() for bound in out.detach().aminmax()):
        return out
    lost = tensor.isfinite() & ~out.isfinite()
    if lost.any():
        index = tuple(lost.nonzero()[0].tolist())
        raise ValueError(
            f"{name} must fit {str(dtype).removeprefix('torch.')} (up to {torch.finfo(dtype).max:g}),"
            f" got {tensor[index].item():g} at {list(index)}"
        )
    return out


def check_cast(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    """The same without the result, for a copy that is made later."""
    if _can_overflow(tensor, dtype):
        cast(tensor, dtype, name)


def _can_overflow(tensor: Tensor, dtype: torch.dtype) -> bool:
    if not (tensor.is_floating_point() and dtype.is_floating_point) or tensor.is_meta or not tensor.numel():
        return False
    return torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
