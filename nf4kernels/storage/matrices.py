"""The matrices that a checkpoint holds, by the names of the model's layers, and the file's tensors that make each."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..quantized_weight import WEIGHT_DTYPES
from .key_conversion import Group, group_tensors


@dataclass(frozen=True)
class Header:
    """One tensor of a shard, as its header has it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: not one that can be quantized


@dataclass(frozen=True, eq=False)
class Unit:
    """Tensors of the file and what the model makes of them together.

    Attributes:
        group: how.
        headers: of the file's tensors, in the group's order.
        shapes: of the model's tensors, by name.
    """

    group: Group
    headers: list[Header]
    shapes: dict[str, tuple[int, ...]]

    @property
    def can_be_quantized(self) -> bool:
        return all(header.dtype in WEIGHT_DTYPES for header in self.headers)

    @property
    def layers_in_file(self) -> list[str]:
        return [header.name.removesuffix(".weight") for header in self.headers]


@dataclass(frozen=True, eq=False)
class Matrix:
    """The weight of a linear layer, or one of the two weights of fused experts."""

    unit: Unit
    name: str  # the model's, of the tensor
    shape: tuple[int, ...]

    @property
    def is_experts(self) -> bool:
        return len(self.shape) == 3


def units_of(model: nn.Module | None, headers: Iterable[Header]) -> list[Unit]:
    """Every tensor of the file in one unit; `model` may be on meta. Nothing is read: the conversions run on meta.

    Tensors whose conversion fails, or gives what the model does not have, stay as they are in the file.
    """
    by_name = {header.name: header for header in headers}
    state = {} if model is None else model.state_dict(keep_vars=True)
    units = []
    for group in group_tensors(model, by_name, state):
        own = [by_name[name] for name in group.sources]
        shapes = _shapes(model, group, own)
        if group.converter is None or (shapes and all(_fits(state.get(n), s) for n, s in shapes.items())):
            units.append(Unit(group, own, shapes))
        else:
            units += [Unit(Group({h.name: ""}, h.name), [h], {h.name: h.shape}) for h in own]
    return units


def _shapes(model: nn.Module | None, group: Group, headers: list[Header]) -> dict[str, tuple[int, ...]]:
    tensors = [torch.empty(h.shape, dtype=h.dtype or torch.uint8, device="meta") for h in headers]
    try:
        return {name: tuple(tensor.shape) for name, tensor in group.convert(model, tensors).items()}
    except Exception:  # what transformers' operations raise has no common type
        return {}


def _fits(expected: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    return expected is not None and tuple(expected.shape) == shape


def matrices_of(units: Iterable[Unit], experts: bool) -> dict[str, Matrix]:
    """layer -> its matrix, under the model's name; experts have two, each by the full name of its parameter."""
    found = {}
    for unit in units:
        for name, shape in unit.shapes.items():
            is_weight = name.endswith(".weight")
            if (len(shape) == 2 and is_weight) or (experts and len(shape) == 3 and not is_weight):
                found[name.removesuffix(".weight")] = Matrix(unit, name, shape)
    return found
