"""What a tensor takes and where it lies, for every kind of tensor that a model may hold."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

INDICES = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def oddity(tensor: Tensor) -> str | None:
    """What the tensor is where it is no plain array of numbers in memory, on meta or to come; None for one that is."""
    if is_lazy(tensor):
        return "not initialized yet"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.')} tensor"
    if tensor.is_quantized:
        return f"a quantized tensor of {tensor.dtype}"
    return None if type(tensor) in (Tensor, nn.Parameter) else f"a {type(tensor).__name__}"


def address(tensor: Tensor) -> int:
    """One number for tensors at one place in memory.

    The address, not the storage: a loader may hand out all weights as views of one mapped file. A tensor that has no
    address stands for itself.
    """
    try:
        return tensor.data_ptr() or id(tensor)
    except (RuntimeError, ValueError):  # sparse; not initialized
        return id(tensor)


def nbytes(tensor: Tensor) -> int:
    """The bytes of its numbers, and of their indices where it is sparse."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    if tensor.layout in INDICES:
        values: Any = tensor.values()
        return values.nbytes + sum(getattr(tensor, name)().nbytes for name in INDICES[tensor.layout])
    return tensor.nbytes


def shape(tensor: Tensor) -> tuple[int, ...]:
    """Its sizes; () for a tensor that has none."""
    try:
        return tuple(tensor.shape)
    except RuntimeError:  # nested; not initialized
        return ()


def model_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, each place in memory once."""
    return sum({address(tensor): nbytes(tensor) for tensor in (*model.parameters(), *model.buffers())}.values())
