"""The gradients: each differentiable op as an `autograd.Function` that calls the ops directly. LoRA's: autograd_lora.

`functional` takes this way only when a gradient is needed: registering autograd with the op costs 6 us more a call.
`Product` alone knows torch.func's transforms and derivatives of any order; the fused Functions hand over to it where
one of these is asked for, since a `setup_context` costs each call some 3 us.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401 (defines what the next lines hold)
from .modes import is_differentiated_again
from .quantized_weight import WeightArgs

_ops = torch.ops.nf4kernels
# Each lookup would cost every call 0.1 us.
_linear: Callable[..., Tensor] = _ops.linear.default
_linear_dgrad: Callable[..., Tensor] = _ops.linear_dgrad.default
_grouped_linear: Callable[..., Tensor] = _ops.grouped_linear.default
_grouped_linear_dgrad: Callable[..., Tensor] = _ops.grouped_linear_dgrad.default
_grouped_lora_grad: Callable[..., Tensor] = _ops.grouped_lora_grad.default
Gradients = tuple[Tensor | None, ...]  # one for each argument of forward


def sizes_of(x: Tensor, weight_args: WeightArgs) -> tuple[int, int, int]:
    """(N, K, block_size) with K as x has it: that is the symbol which torch.compile(dynamic=True) can find again."""
    return weight_args[6], x.shape[-1], weight_args[8]


def as_matrix(x: Tensor) -> Tensor:
    """`[..., K]` as `[M, K]`: `reshape(-1, K)` that also knows what to do with K = 0."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


class Product(torch.autograd.Function):
    """x @ Ŵ.T, or x @ Ŵ where transposed; with expert_offsets each expert's rows times its Ŵ.

    Linear in x, so that the two are each other's derivative, and there are derivatives of every order and mode.
    """

    @staticmethod
    def forward(x: Tensor, expert_offsets: Tensor | None, weight_args: WeightArgs, transposed: bool) -> Tensor:
        if expert_offsets is None:
            return _linear_dgrad(x, *weight_args) if transposed else _linear(x, *weight_args, None)
        return (_grouped_linear_dgrad if transposed else _grouped_linear)(x, expert_offsets, *weight_args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.constants, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        return Product.apply(dy, *ctx.constants, not ctx.transposed), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        y: Tensor = Product.apply(dx, *ctx.constants, ctx.transposed)
        return y

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, expert_offsets: Tensor | None, weight_args: WeightArgs,
             transposed: bool) -> tuple[Tensor, int]:  # fmt: skip
        """The batch becomes rows of x: there is one weight for all of it."""
        x_dim, offsets_dim, weight_dims, _ = in_dims
        if any(dim is not None for dim in weight_dims):
            raise RuntimeError(
                "nf4kernels.linear: the 4-bit weight must be one for the whole batch of vmap, got a batch of weights"
                " (stack x, bias and adapters alone)"
            )
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        if expert_offsets is None:
            return Product.apply(x, None, weight_args, transposed), 0
        if offsets_dim is None:  # row t of every sample side by side: sorted by expert as one sample is
            rows = x.transpose(0, 1)
            y = Product.apply(rows.flatten(0, 1), expert_offsets * info.batch_size, weight_args, transposed)
            return y.unflatten(0, rows.shape[:2]), 1
        samples = zip(x, expert_offsets.movedim(offsets_dim, 0))
        return torch.stack([Product.apply(*sample, weight_args, transposed) for sample in samples]), 0


def composed_linear(x: Tensor, bias: Tensor | None, weight_args: WeightArgs) -> Tensor:
    """`Linear` for every transform and derivative; bias is added after the rounding to x's dtype."""
    y: Tensor = Product.apply(x, None, weight_args, False)
    return y if bias is None else y + bias


class Linear(torch.autograd.Function):
    """dx = dy @ Ŵ; the frozen weight makes x itself unnecessary in backward, so it is not saved.

    The weight's arguments come as one tuple: autograd unpacks and wraps each argument of its own, 2 us for the nine.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight_args: WeightArgs) -> Tensor:
        ctx.save_for_backward(*weight_args[:6])
        ctx.sizes = sizes_of(x, weight_args)
        return _linear(x, *weight_args, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            if is_differentiated_again():
                dx = Product.apply(dy, None, (*ctx.saved_tensors, *ctx.sizes), True)
            else:
                dx = _linear_dgrad(dy, *ctx.saved_tensors, *ctx.sizes)
        if ctx.needs_input_grad[1]:
            dbias = as_matrix(dy).sum(0)
        return dx, dbias, None


class GroupedLinear(torch.autograd.Function):
    """dx = each expert's rows of dy @ its Ŵ, dbias [E, N] = each expert's sum of its rows of dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_offsets: Tensor, bias: Tensor | None, weight_args: WeightArgs) -> Tensor:
        ctx.save_for_backward(expert_offsets, *weight_args[:6])
        ctx.sizes = sizes_of(x, weight_args)
        return _grouped_linear(x, expert_offsets, *weight_args, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        expert_offsets, *weight = ctx.saved_tensors
        again, dx, dbias = is_differentiated_again(), None, None
        if ctx.needs_input_grad[0] and again:
            dx = Product.apply(dy, expert_offsets, (*weight, *ctx.sizes), True)
        elif ctx.needs_input_grad[0]:
            dx = _grouped_linear_dgrad(dy, expert_offsets, *weight, *ctx.sizes)
        if ctx.needs_input_grad[2]:
            dbias = sums_of_rows(dy, expert_offsets, again)
        return dx, None, dbias, None


def sums_of_rows(dy: Tensor, expert_offsets: Tensor, differentiably: bool) -> Tensor:
    """[E, N], the sum of each expert's rows of dy [T, N] in its dtype."""
    if differentiably:
        return membership_of(expert_offsets, dy.shape[0]).to(dy.dtype).mT @ dy
    ones = dy.new_ones(dy.shape[0], 1)
    return _grouped_lora_grad(ones, dy, expert_offsets, 1.0, dy.dtype)[:, 0]


def membership_of(expert_offsets: Tensor, T: int) -> Tensor:
    """bool [T, E]: whether the row is the expert's, by sound offsets or as a device takes others."""
    ends = expert_offsets.clamp(0, T).cummax(0).values
    begins = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    rows = torch.arange(T, dtype=torch.int32, device=ends.device)[:, None]
    return (begins <= rows) & (rows < ends)
