"""PEFT's DoRA on a QuantLinear, with no dense copy of its weight."""

from typing import Any

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ...functional import dequantize_rows_from_args, take_columns
from ...modes import without_autocast
from ...nn.quant_linear import QuantLinear

ELEMENTS = 1 << 20  # of the weight that are dense at a time, in fp32
_cached = getattr(dora, "cache_decorator", lambda key: lambda function: function)  # PEFT 0.18 has no cache


class QuantDoraLayer(dora.DoraLinearLayer):
    """DoRA's magnitudes of one adapter; the norms of the rows of Ŵ + scaling * B @ A are taken a few rows at a time."""

    def update_layer(
        self, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, place_on_cpu: bool = False
    ) -> None:
        """Start the magnitudes at these norms, `[out_features]` in lora_A's dtype."""
        self.weight = nn.Parameter(row_norms(base_layer, lora_A, lora_B, scaling).to(lora_A.dtype))

    @_cached("weight-norm")
    def norms(self, base_layer: nn.Module, A: Tensor, B: Tensor, scaling: float, adapter_name: str = "") -> Tensor:
        return row_norms(base_layer, A, B, scaling)

    def factors(self, base_layer: nn.Module, A: Tensor, B: Tensor, scaling: float, adapter_name: str) -> Tensor:
        """What each output is multiplied with, `[out_features]`: magnitude / norm, the norm without a gradient.

        Source: DoRA (arXiv 2402.09353), section 4.3.
        """
        magnitudes: Tensor = self.weight
        return magnitudes / self.norms(base_layer, A, B, scaling, adapter_name=adapter_name).to(magnitudes.dtype)

    def forward(
        self, x: Tensor, *, lora_A: nn.Linear, lora_B: nn.Linear, scaling: float, base_layer: Any,
        base_result: Tensor | None = None, adapter_name: str = "default",
    ) -> Tensor:  # fmt: skip
        """What DoRA adds to the base layer's output; `base_result` is that output where x was not dropped out."""
        if base_result is None:
            base_result = base_layer(x)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        factors = self.factors(base_layer, lora_A.weight, lora_B.weight, scaling, adapter_name)
        added: Tensor = (factors - 1) * base_result + factors * lora_B(lora_A(x)) * scaling
        return added


class QuantDoraVariant(DoraLinearVariant):
    """PEFT's variant, with the layer above."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        if "lora_magnitude_vector" not in module.adapter_layer_names:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = QuantDoraLayer(fan_in_fan_out=False)
        layer.update_layer(
            base_layer=module.get_base_layer(), lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight, scaling=module.scaling[adapter_name],
        )  # fmt: skip
        module.lora_magnitude_vector[adapter_name] = layer


@torch.no_grad()
def row_norms(base_layer: Any, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The norm of each row of W + scaling * B @ A, fp32 `[out_features]`; W is the base layer's weight."""
    N, K = B.shape[0], A.shape[1]
    if A.is_meta:
        return A.new_empty(N, dtype=torch.float32)
    norms = []
    step = max(1, ELEMENTS // max(K, 1))
    weight_args = base_layer._weight_args() if isinstance(base_layer, QuantLinear) else None
    A = A.float()
    if weight_args is not None:  # a norm is the same in any order of the columns
        A = take_columns(A, base_layer.column_order, K)
    for begin in range(0, N, step):
        rows = slice(begin, min(begin + step, N))
        if weight_args is None:
            W = base_layer.weight[rows].float()
        else:
            W = dequantize_rows_from_args(weight_args, (rows.start, rows.stop), torch.float32)
        with without_autocast(W.device):
            norms.append(torch.linalg.vector_norm(torch.addmm(W, B[rows].float(), A, alpha=scaling), dim=1))
    return torch.cat(norms) if norms else A.new_zeros(0)
