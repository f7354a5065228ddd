"""The gradients: each differentiable op as an `autograd.Function` that calls the ops directly.

`functional` takes this way only when a gradient is needed: registering autograd with the op costs 6 us more a call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops  # noqa: F401 (defines what the next lines hold)
from .quantized_weight import WEIGHT_DTYPES, WeightArgs

_ops = torch.ops.nf4kernels
# Each lookup would cost every call 0.1 us.
_linear: Callable[..., Tensor] = _ops.linear.default
_linear_dgrad: Callable[..., Tensor] = _ops.linear_dgrad.default
_grouped_linear: Callable[..., Tensor] = _ops.grouped_linear.default
_grouped_linear_dgrad: Callable[..., Tensor] = _ops.grouped_linear_dgrad.default
_lora_grad: Callable[..., Tensor] = _ops.lora_grad.default
Gradients = tuple[Tensor | None, ...]  # one for each argument of forward


def autocast_is_on(device: torch.device) -> bool:
    device_type = device.type
    is_on: bool = device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch raises for meta
    return is_on


def _sizes(x: Tensor, weight_args: WeightArgs) -> tuple[int, int, int]:
    """(N, K, block_size) with K as x has it: that is the symbol which torch.compile(dynamic=True) can find again."""
    return weight_args[6], x.shape[-1], weight_args[8]


class Linear(torch.autograd.Function):
    """dx = dy @ Ŵ; the frozen weight makes x itself unnecessary in backward, so it is not saved.

    The weight's arguments come as one tuple: autograd unpacks and wraps each argument of its own, 2 us for the nine.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight_args: WeightArgs) -> Tensor:
        ctx.save_for_backward(*weight_args[:6])
        ctx.sizes = _sizes(x, weight_args)
        return _linear(x, *weight_args, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _linear_dgrad(dy, *ctx.saved_tensors, *ctx.sizes)
        if ctx.needs_input_grad[1]:
            dbias = _matrix(dy).sum(0)
        return dx, dbias, None


class GroupedLinear(torch.autograd.Function):
    """dx = each expert's rows of dy @ its Ŵ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_offsets: Tensor, weight_args: WeightArgs) -> Tensor:
        ctx.save_for_backward(expert_offsets, *weight_args[:6])
        ctx.sizes = _sizes(x, weight_args)
        return _grouped_linear(x, expert_offsets, *weight_args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        return _grouped_linear_dgrad(dy, *ctx.saved_tensors, *ctx.sizes), None, None


def lora_forward(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
    weight_args: WeightArgs,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(y, P, mask) as `LoraLinear` names them; P is the LoRA inner product [M, r]."""
    dropped, mask = x, None
    if dropout_p > 0:
        dropped, mask = torch.native_dropout(x, dropout_p, True)
    P = _lora_inner(dropped, lora_A.to(x.dtype))  # [M, r]
    y = _linear(x, *weight_args, bias, P, _lora_factor(lora_B, x.dtype), scaling)
    return y, P, mask


def _lora_factor(lora: Tensor, dtype: torch.dtype) -> Tensor:
    """A LoRA factor as the op wants it; both calls return the tensor itself where there is nothing to do."""
    return lora.to(dtype).contiguous()


class LoraLinear(torch.autograd.Function):
    """With P = dropout(x) @ A.T and Q = dy @ B: dA = scaling * Q.T @ dropout(x), dB = scaling * dy.T @ P,
    dx = dy @ Ŵ + scaling * dropout'(Q @ A), the mask of forward used again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
        weight_args: WeightArgs,
    ) -> Tensor:  # fmt: skip
        y, P, mask = lora_forward(x, lora_A, lora_B, bias, scaling, dropout_p, weight_args)
        ctx.save_for_backward(x, mask, P, lora_A, lora_B, *weight_args[:6])
        ctx.sizes, ctx.scaling, ctx.dropout_scale = _sizes(x, weight_args), scaling, 1 / (1 - dropout_p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        if not autocast_is_on(dy.device):
            return _lora_gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):  # the forward's dtype holds, whatever is on around backward
            return _lora_gradients(ctx, dy)


def _lora_gradients(ctx: Any, dy: Tensor) -> Gradients:
    x, mask, P, lora_A, lora_B, *weight = ctx.saved_tensors
    need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
    scaling: float = ctx.scaling
    dx = dA = dB = dbias = None
    if need_x or need_A:
        Q = _lora_inner(dy, lora_B.to(dy.dtype).T)  # [M, r]
    if need_x:
        A = _lora_factor(lora_A, dy.dtype)
        if mask is None:
            dx = _linear_dgrad(dy, *weight, *ctx.sizes, Q, A, scaling)
        else:  # the mask is on Q @ A alone
            dx = _linear_dgrad(dy, *weight, *ctx.sizes)
            dx += torch.ops.aten.native_dropout_backward((Q @ A).view_as(dx), mask, scaling * ctx.dropout_scale)
    if need_A:
        dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, ctx.dropout_scale)
        dA = _lora_grad(Q, dropped, scaling, _gradient_dtype(lora_A)).to(lora_A.dtype)
    if need_B:
        dB = _lora_grad(P, dy, scaling, _gradient_dtype(lora_B), True).to(lora_B.dtype)
    if need_bias:
        dbias = _matrix(dy).sum(0)
    return dx, dA, dB, dbias, None, None, None


def _lora_inner(x: Tensor, lora_factor: Tensor) -> Tensor:
    """x @ lora_factor.T, `[M, r]`; by way of its transpose it takes 0.62 of oneDNN's time (bf16, M = 512, r = 16)."""
    return (lora_factor @ _matrix(x).T).T.contiguous()


def _gradient_dtype(lora: Tensor) -> torch.dtype:
    return lora.dtype if lora.dtype in WEIGHT_DTYPES else torch.float32


def _matrix(x: Tensor) -> Tensor:
    """`[..., K]` as `[M, K]`: `reshape(-1, K)` that also knows what to do with K = 0."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]
