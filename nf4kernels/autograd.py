"""The gradients: each differentiable op as an `autograd.Function` that calls the ops directly.

`functional` takes this way only when a gradient is needed: registering autograd with the op costs 6 us more a call.
`Product` alone knows torch.func's transforms and derivatives of any order; the fused Functions hand over to it where
one of these is asked for, since a `setup_context` costs each call some 3 us.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops  # noqa: F401 (defines what the next lines hold)
from .quantized_weight import WEIGHT_DTYPES, WeightArgs

_ops = torch.ops.nf4kernels
# Each lookup would cost every call 0.1 us.
_linear: Callable[..., Tensor] = _ops.linear.default
_linear_dgrad: Callable[..., Tensor] = _ops.linear_dgrad.default
_grouped_linear: Callable[..., Tensor] = _ops.grouped_linear.default
_grouped_linear_dgrad: Callable[..., Tensor] = _ops.grouped_linear_dgrad.default
_lora_grad: Callable[..., Tensor] = _ops.lora_grad.default
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_transforms_are_active = torch._C._are_functorch_transforms_active
Gradients = tuple[Tensor | None, ...]  # one for each argument of forward


def autocast_is_on(device: torch.device) -> bool:
    device_type = device.type
    is_on: bool = device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch raises for meta
    return is_on


_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_inference_mode(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """For what makes tensors that training is to go through: autograd refuses those that inference mode made."""

    @functools.wraps(function)
    def normal(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return normal


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD or a transform of torch.func is at work on one of the tensors."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    return _transforms_are_active() and any(_is_wrapped(tensor) for tensor in tensors if tensor is not None)


def _is_differentiated_again() -> bool:
    """Whether a backward that is running is itself recorded; never in what torch.compile traces."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _sizes(x: Tensor, weight_args: WeightArgs) -> tuple[int, int, int]:
    """(N, K, block_size) with K as x has it: that is the symbol which torch.compile(dynamic=True) can find again."""
    return weight_args[6], x.shape[-1], weight_args[8]


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


def composed_lora_linear(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
    weight_args: WeightArgs,
) -> Tensor:  # fmt: skip
    """`LoraLinear` for every transform and derivative; the terms are rounded to x's dtype before they are added."""
    dropped = torch.nn.functional.dropout(x, dropout_p) if dropout_p > 0 else x
    lora_term = dropped @ lora_A.to(x.dtype).mT @ lora_B.to(x.dtype).mT
    return composed_linear(x, bias, weight_args) + scaling * lora_term


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
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            if _is_differentiated_again():
                dx = Product.apply(dy, None, (*ctx.saved_tensors, *ctx.sizes), True)
            else:
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
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        if _is_differentiated_again():
            expert_offsets, *weight = ctx.saved_tensors
            return Product.apply(dy, expert_offsets, (*weight, *ctx.sizes), True), None, None
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
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        gradients = _composed_lora_gradients if _is_differentiated_again() else _lora_gradients
        if not autocast_is_on(dy.device):
            return gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):  # the forward's dtype holds, whatever is on around backward
            return gradients(ctx, dy)


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


def _composed_lora_gradients(ctx: Any, dy: Tensor) -> Gradients:
    """The same by differentiable operations, P computed again."""
    x, mask, _, lora_A, lora_B, *weight = ctx.saved_tensors
    A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    kept = None if mask is None else mask.to(dy.dtype) * ctx.dropout_scale
    Q = dy @ B
    dx = Product.apply(dy, None, (*weight, *ctx.sizes), True)
    dx = dx + ctx.scaling * (Q @ A if kept is None else kept * (Q @ A))
    dropped = x if kept is None else kept * x
    dA = _outer(Q, dropped, ctx.scaling, lora_A)
    dB = _outer(dy, dropped @ A.mT, ctx.scaling, lora_B)
    gradients = (dx, dA, dB, _matrix(dy).sum(0))
    needed = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad))
    return *needed, None, None, None


def _outer(a: Tensor, b: Tensor, scaling: float, lora_factor: Tensor) -> Tensor:
    """scaling * a.T @ b over the rows, as the gradient of lora_factor."""
    a, b = (_matrix(t).to(lora_factor.dtype) for t in (a, b))
    return scaling * a.T @ b


def _lora_inner(x: Tensor, lora_factor: Tensor) -> Tensor:
    """x @ lora_factor.T, `[M, r]`; by way of its transpose it takes 0.62 of oneDNN's time (bf16, M = 512, r = 16)."""
    return (lora_factor @ _matrix(x).T).T.contiguous()


def _gradient_dtype(lora: Tensor) -> torch.dtype:
    return lora.dtype if lora.dtype in WEIGHT_DTYPES else torch.float32


def _matrix(x: Tensor) -> Tensor:
    """`[..., K]` as `[M, K]`: `reshape(-1, K)` that also knows what to do with K = 0."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]
