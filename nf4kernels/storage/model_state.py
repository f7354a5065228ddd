"""A model's state as a checkpoint has it: what is in 4 bits, what is dense, and which names are of one tensor."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from ..model.memory import address, oddity
from ..model.walk import named_modules, state_dict
from ..nn.grouped_quant_linear import GroupedQuantLinear
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import OF_WEIGHT, QuantLinear
from ..nn.quant_module import QuantModule
from ..quantized_weight import WEIGHT_DTYPES


def float_dtype(model: nn.Module) -> torch.dtype | None:
    """What a model runs in: its first parameter's that is a number; None where none is."""
    return next((each.dtype for each in model.parameters() if each.dtype in WEIGHT_DTYPES), None)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """name -> layer, under all its names."""
    return {name: module for name, module in named_modules(model) if isinstance(module, QuantLinear)}


def adapted_experts(
    model: nn.Module, made: Mapping[nn.Module, QuantExperts] | None = None
) -> dict[str, GroupedQuantLinear]:
    """name -> weight of experts in 4 bits, under the first name of each; `made`: dense module -> what stands for it."""
    found: dict[GroupedQuantLinear, str] = {}
    for name, module in named_modules(model):
        experts = (made or {}).get(module, module)
        if isinstance(experts, QuantExperts):
            for leaf in experts.weights:
                found.setdefault(getattr(experts, leaf), join(name, leaf))
    return {name: part for part, name in found.items()}


def dense_state(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The model's state without the weights of `layers`, nor what a file need not hold."""
    state = state_dict(model)
    for name in layers:
        for key in OF_WEIGHT:
            state.pop(join(name, key), None)
    for name, module in named_modules(model):
        if isinstance(module, QuantModule):
            state.pop(join(name, "checksum"), None)
    return state


def shared(state: dict[str, Tensor]) -> Iterator[list[str]]:
    """Groups of names whose tensors are the same memory."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        view = None if oddity(tensor) else (tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault((address(tensor), view), []).append(name)
    yield from groups.values()


def unwritable(tensor: Any) -> str | None:
    """What a value of a state is, where safetensors has no way to hold it."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    if tensor.is_meta:
        return "a meta tensor"
    return oddity(tensor) or (None if _is_storable(tensor.dtype) else f"one of {tensor.dtype}")


@cache
def _is_storable(dtype: torch.dtype) -> bool:
    try:
        save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, SafetensorError):
        return False
    return True
