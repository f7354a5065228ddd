"""sort_by_expert and combine_experts: from tokens to the rows of their experts and back, with gradients.

Each is linear in its rows, and the gradient of one is the other's sum or its own spreading, so that no gradient adds by
scattering. torch.func's transforms and derivatives of a backward run the reference, which is plain PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from . import ops, reference  # noqa: F401 (ops defines what the next lines hold)
from .autograd import Gradients
from .modes import is_differentiated_again, is_transformed
from .quantized_weight import WEIGHT_DTYPES

_ops = torch.ops.nf4kernels
# Each lookup would cost every call 0.1 us.
_sort_by_expert: Any = _ops.sort_by_expert.default
_combine: Any = _ops.combine_experts.default
_combine_dgrad: Any = _ops.combine_experts_dgrad.default
_combine_wgrad: Any = _ops.combine_experts_wgrad.default


def sort_by_expert(x: Tensor, top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows[positions[t, j]] = x[t], sorted by the expert top_k_index[t, j]; differentiable in x.

    What `grouped_linear` takes. Rows of one expert stay in the order of (t, j). Nothing waits for a device.

    Args:
        x: `[T, H]`, float32, bfloat16 or float16, any strides.
        top_k_index: `[T, k]`, integers on x's device, in 0..num_experts: each token's experts. `num_experts` stands for
            none, as for an expert that lives on another process: such rows are zeros after all others.
        num_experts: E.

    Returns:
        rows `[T * k, H]` in x's dtype, expert_offsets int32 `[E]`, and positions int32 `[T, k]`: the row of each
        choice, and ~row where there is no expert.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device. RuntimeError: an index outside 0..num_experts; on a
            device when it gets there.
    """
    who = "nf4kernels.sort_by_expert"
    if x.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: x must be float32, bfloat16 or float16, got {x.dtype}")
    if top_k_index.dtype != torch.int64:
        if top_k_index.is_floating_point() or top_k_index.is_complex() or top_k_index.dtype == torch.bool:
            raise TypeError(f"{who}: top_k_index must be integers, got {top_k_index.dtype}")
        top_k_index = top_k_index.long()
    shape, index_shape = x.shape, top_k_index.shape
    if len(shape) != 2 or len(index_shape) != 2 or index_shape[0] != shape[0]:
        came = f"{list(shape)} and {list(index_shape)}"
        raise ValueError(f"{who}: x and top_k_index must have shapes [T, H] and [T, k], got {came}")
    if top_k_index.device != x.device:
        raise ValueError(f"{who}: top_k_index must be on {x.device} as x is, got {top_k_index.device}")
    if is_transformed(x, top_k_index):
        return reference.sort_by_expert(x, top_k_index, num_experts)
    if torch.is_grad_enabled() and x.requires_grad:
        sorted_rows: tuple[Tensor, Tensor, Tensor] = SortByExpert.apply(x, top_k_index, num_experts)
        return sorted_rows
    result: tuple[Tensor, Tensor, Tensor] = _sort_by_expert(x, top_k_index, num_experts)
    return result


def combine_experts(
    rows: Tensor, positions: Tensor, weights: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """out[t] = sum over j of weights[t, j] * rows[positions[t, j]]; differentiable in rows and weights.

    Args:
        rows: `[T * k, H]`, float32, bfloat16 or float16, any strides.
        positions: int32 `[T, k]`, as `sort_by_expert` gives them; a negative one has no part in the sum.
        weights: `[T, k]`, the router's; None stands for 1.
        dtype: of the result; None is rows'.

    Returns:
        `[T, H]`; products and sums are in fp32, in the order of j, and rounded once to dtype.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device. RuntimeError: on the CPU, a position that is no
            row, or is there twice. A device takes the first for a negative one, and leaves the gradient of a row that
            no position names undefined.
    """
    who = "nf4kernels.combine_experts"
    if rows.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: rows must be float32, bfloat16 or float16, got {rows.dtype}")
    if positions.dtype != torch.int32:
        raise TypeError(f"{who}: positions must be int32, got {positions.dtype}")
    shape = positions.shape
    if rows.dim() != 2 or len(shape) != 2 or rows.shape[0] != shape[0] * shape[1]:
        came = f"{list(rows.shape)} and {list(shape)}"
        raise ValueError(f"{who}: rows and positions must have shapes [T * k, H] and [T, k], got {came}")
    if weights is not None:
        if weights.shape != shape:
            raise ValueError(f"{who}: weights must have shape {list(shape)} as positions, got {list(weights.shape)}")
        weights = weights if weights.dtype in WEIGHT_DTYPES else weights.float()
    for name, tensor in (("positions", positions), ("weights", weights)):
        if tensor is not None and tensor.device != rows.device:
            raise ValueError(f"{who}: {name} must be on {rows.device} as rows are, got {tensor.device}")
    dtype = dtype or rows.dtype
    if is_transformed(rows, positions, weights):
        return reference.combine_experts(rows, positions, weights, dtype)
    if torch.is_grad_enabled() and (rows.requires_grad or (weights is not None and weights.requires_grad)):
        out: Tensor = CombineExperts.apply(rows, positions, weights, dtype)
        return out
    result: Tensor = _combine(rows, positions, weights, dtype)
    return result


class SortByExpert(torch.autograd.Function):
    """dx[t] = sum over j of drows[positions[t, j]]: combine_experts without weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, expert_offsets, positions = _sort_by_expert(x, top_k_index, num_experts)
        ctx.mark_non_differentiable(expert_offsets, positions)
        ctx.save_for_backward(positions)
        ctx.dtype = x.dtype
        return rows, expert_offsets, positions

    @staticmethod
    def backward(ctx: Any, drows: Tensor, *_: Any) -> Gradients:
        (positions,) = ctx.saved_tensors
        combine = reference.combine_experts if is_differentiated_again() else _combine
        return combine(drows, positions, None, ctx.dtype), None, None


class CombineExperts(torch.autograd.Function):
    """drows[positions[t, j]] = weights[t, j] * dout[t], and dweights[t, j] = dout[t] · rows[positions[t, j]]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        need_weights = weights is not None and weights.requires_grad
        ctx.save_for_backward(rows if need_weights else None, positions, weights)
        ctx.rows_dtype = rows.dtype
        out: Tensor = _combine(rows, positions, weights, dtype)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        rows, positions, weights = ctx.saved_tensors
        again = is_differentiated_again()
        drows = dweights = None
        if ctx.needs_input_grad[0]:
            dgrad = reference.combine_experts_dgrad if again else _combine_dgrad
            drows = dgrad(dout, positions, weights, ctx.rows_dtype)
        if ctx.needs_input_grad[2]:
            wgrad = reference.combine_experts_wgrad if again else _combine_wgrad
            dweights = wgrad(dout, rows, positions, weights.dtype)
        return drows, None, dweights, None
