"""The products of experts' adapters added to fused experts, in the tensors that the files have of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import dequantize, quantize_experts
from ..nn.casts import cast
from ..nn.experts_layout import as_rows, layout_problem
from ..quantized_weight import WEIGHT_DTYPES
from .dense_tensors import DenseTensors
from .key_conversion import take_apart
from .matrices import Unit
from .peft_experts import ExpertsShapes, experts_loras, wrapped_module
from .peft_format import StoredLora


class AdaptedExperts:
    """One weight of a layer's experts with its adapter, read and merged when its first tensor is asked for.

    Args:
        name: the model's name of the weight.
        lora: A `[E, r, K]`, B `[E, N, r]`.
        unit: the file's tensors that become the weight.
        model: on the meta device; its rules put them together and take them apart.
        who: names the caller in messages.

    Attributes:
        names: of the file's tensors.

    Raises:
        ValueError: the tensors become other weights as well, are of another dtype, or do not fit the adapter.
    """

    def __init__(self, name: str, lora: StoredLora, unit: Unit, model: nn.Module, who: str) -> None:
        self.name, self.lora, self._unit, self._model, self._who = name, lora, unit, model, who
        self.names = [header.name for header in unit.headers]
        self._made: dict[str, Tensor] = {}
        self._module = model.get_submodule(name.rpartition(".")[0])
        dtypes = {header.dtype for header in unit.headers}
        if set(unit.shapes) != {name} or len(dtypes) != 1 or not dtypes <= {*WEIGHT_DTYPES}:
            raise ValueError(
                f"{who}: {name} must be all that its tensors in the files become, in float32, bfloat16 or float16, got"
                f" {', '.join(unit.shapes)} of {self.names[0]} and the like in {', '.join(map(str, dtypes))}"
            )
        (E, N, K), r = as_rows(self._module, torch.empty(unit.shapes[name], device="meta")).shape, lora.config.r
        expected, came = [(E, r, K), (E, N, r)], [tuple(lora.A.shape), tuple(lora.B.shape)]
        if came != expected:
            raise ValueError(f"{who}: {name} must have an adapter of shapes {expected}, got {came}")

    def delta(self, expert: int) -> Tensor:
        """scaling * B @ A of an expert, fp32 `[N, K]`."""
        return (self.lora.B[expert].float() @ self.lora.A[expert].float()).mul_(self.lora.config.scaling)

    def read(self, name: str, dense: DenseTensors) -> Tensor:
        """A merged tensor of the file: sums in fp32, rounded once. Every one can be taken once each time round."""
        if name not in self._made:
            self._made = self._merged(dense)
        return self._made.pop(name)

    def _merged(self, dense: DenseTensors) -> dict[str, Tensor]:
        weight = self._weight(dense)
        merged = torch.empty(weight.shape, dtype=self._unit.headers[0].dtype)
        for expert, (rows, into) in enumerate(zip(as_rows(self._module, weight), as_rows(self._module, merged))):
            into.copy_(cast(self.delta(expert).add_(rows), merged.dtype, f"the merged {self.name}"))
            if not all(bound.isfinite() for bound in into.aminmax()):
                raise ValueError(f"{self._who}: the merged {self.name} must be finite, got nan or inf in {expert}")
        del weight
        if self._unit.group.converter is None:
            return {self.names[0]: merged}
        try:
            found = take_apart(self._model, self.name, merged)
        except ValueError as error:
            raise ValueError(f"{self._who}: {error}") from None
        if found.keys() != {*self.names}:
            raise ValueError(
                f"{self._who}: {self.name} must be taken apart as the files have it by transformers' rules, got"
                f" {min(found)} for {min(self.names)} and the like"
            )
        return found

    def _weight(self, dense: DenseTensors) -> Tensor:
        """The weight as the model has it; in fp32 where it is decoded."""
        tensors = [dense.read(name, torch.float32) for name in self.names]
        return self._unit.group.convert(self._model, tensors)[self.name]

    def changes(self, dense: DenseTensors, options: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """(Ŵ' - Ŵ, the adapter's product) of every expert, fp32 `[N, K]`, Ŵ quantized before the merge and Ŵ' after.

        Experts that are in 4 bits are Ŵ already. `options` are those of `nf4kernels.quantize`.
        """
        dtype = self._unit.headers[0].dtype

        def rounded(weight: Tensor) -> Tensor:
            return dequantize(quantize_experts(weight[None].contiguous(), **options)[0], torch.float32)

        for expert, rows in enumerate(as_rows(self._module, self._weight(dense))):
            delta = self.delta(expert)
            before = rows if self.is_packed(dense) else rounded(rows)
            yield rounded((delta + rows).to(dtype)).sub_(before), delta

    def is_packed(self, dense: DenseTensors) -> bool:
        """Whether the files have it in 4 bits."""
        return self.names[0] in dense.experts

    def stays_dense(self, block_size: int) -> bool:
        """Whether `nf4kernels.quantize_model` would leave it."""
        return layout_problem(self._module, block_size) is not None


def adapted_experts(
    factors: Mapping[str, tuple[Tensor, Tensor]], model: nn.Module, units: list[Unit], fit: Any, config: dict[str, Any],
    file: Path, who: str,
) -> tuple[list[AdaptedExperts], set[str]]:  # fmt: skip
    """(the weights of experts that have adapters, the names in the file of these adapters).

    Arguments are those of `experts_loras`. ValueError where they do not fit the model, or its files do not have them.
    """
    shapes = {path: ExpertsShapes.of(module) for path, module in model.named_modules()}
    experts = {path: each for path, each in shapes.items() if each is not None}
    loras = experts_loras(factors, experts, fit, config, file, who, "experts")
    unit_of = {name: unit for unit in units for name in unit.shapes}
    found = []
    for name, lora in loras.items():
        if name not in unit_of:
            raise ValueError(f"{who}: the files must have the tensors of {name}, which the adapter is for, got none")
        found.append(AdaptedExperts(name, lora, unit_of[name], model, who))
    of_experts = {path for path in factors if (fit(wrapped_module(path)[0]) or wrapped_module(path)[0]) in experts}
    return found, of_experts
