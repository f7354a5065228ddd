"""The gradients of LoRA's products, of one weight and of experts, with the frozen weight's in the same ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401 (defines what the next lines hold)
from .autograd import Gradients, Product, as_matrix, composed_linear, membership_of, sizes_of, sums_of_rows
from .backends import select
from .modes import is_differentiated_again, without_autocast
from .quantized_weight import WEIGHT_DTYPES, WeightArgs

_ops = torch.ops.nf4kernels
# Each lookup would cost every call 0.1 us.
_linear: Callable[..., Tensor] = _ops.linear.default
_linear_dgrad: Callable[..., Tensor] = _ops.linear_dgrad.default
_grouped_linear: Callable[..., Tensor] = _ops.grouped_linear.default
_grouped_linear_dgrad: Callable[..., Tensor] = _ops.grouped_linear_dgrad.default
_lora_grad: Callable[..., Tensor] = _ops.lora_grad.default
_grouped_lora_inner: Callable[..., Tensor] = _ops.grouped_lora_inner.default
_grouped_lora_grad: Callable[..., Tensor] = _ops.grouped_lora_grad.default
FEW_ROWS = 4  # whose expert_offsets are kept, as making them takes as long as a decoded token's product
_ENDS = [torch.tensor([rows], dtype=torch.int32, device="cpu") for rows in range(FEW_ROWS + 1)]


def lora_forward(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
    weight_args: WeightArgs,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(y, P, mask) as `LoraLinear` names them; P is the LoRA inner product [M, r]."""
    dropped, mask = x, None
    if dropout_p > 0:
        dropped, mask = torch.native_dropout(x, dropout_p, True)
    P = _lora_inner(dropped, lora_A if lora_A.dtype == x.dtype else lora_A.to(x.dtype))  # [M, r]
    y = _linear(x, *weight_args, bias, P, _lora_factor(lora_B, x.dtype), scaling)
    return y, P, mask


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
        ctx.sizes, ctx.scaling, ctx.dropout_scale = sizes_of(x, weight_args), scaling, 1 / (1 - dropout_p)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        gradients = _composed_lora_gradients if is_differentiated_again() else _lora_gradients
        with without_autocast(dy.device):  # the forward's dtype holds, whatever is on around backward
            return gradients(ctx, dy)


def _lora_gradients(ctx: Any, dy: Tensor) -> Gradients:
    x, mask, P, lora_A, lora_B, *weight = ctx.saved_tensors
    need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
    scaling: float = ctx.scaling
    dx = dA = dB = dbias = None
    if need_x or need_A:
        Q = _lora_inner(dy, lora_B.to(dy.dtype), True)  # [M, r]
    if need_x:
        A = _lora_factor(lora_A, dy.dtype)
        if mask is None:
            dx = _linear_dgrad(dy, *weight, *ctx.sizes, Q, A, scaling)
        else:  # the mask is on Q @ A alone
            dx = _linear_dgrad(dy, *weight, *ctx.sizes)
            term = _lora_outer(Q, A).view_as(dx)
            dx += torch.ops.aten.native_dropout_backward(term, mask, scaling * ctx.dropout_scale)
    if need_A:
        dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, ctx.dropout_scale)
        dA = _lora_grad(Q, dropped, scaling, _gradient_dtype(lora_A)).to(lora_A.dtype)
    if need_B:
        dB = _lora_grad(P, dy, scaling, _gradient_dtype(lora_B), True).to(lora_B.dtype)
    if need_bias:
        dbias = as_matrix(dy).sum(0)
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
    gradients = (dx, dA, dB, as_matrix(dy).sum(0))
    needed = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad))
    return *needed, None, None, None


def composed_lora_linear(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dropout_p: float,
    weight_args: WeightArgs,
) -> Tensor:  # fmt: skip
    """`LoraLinear` for every transform and derivative; the terms are rounded to x's dtype before they are added."""
    dropped = torch.nn.functional.dropout(x, dropout_p) if dropout_p > 0 else x
    lora_term = dropped @ lora_A.to(x.dtype).mT @ lora_B.to(x.dtype).mT
    return composed_linear(x, bias, weight_args) + scaling * lora_term


def grouped_lora_forward(
    x: Tensor, expert_offsets: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float,
    dropout_p: float, weight_args: WeightArgs,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(y, P, mask) as `lora_forward` gives them."""
    dropped, mask = x, None
    if dropout_p > 0:
        dropped, mask = torch.native_dropout(x, dropout_p, True)
    P = _grouped_lora_inner(dropped, expert_offsets, _lora_factor(lora_A, x.dtype))  # [T, r]
    y = _grouped_linear(x, expert_offsets, *weight_args, bias, P, _lora_factor(lora_B, x.dtype), scaling)
    return y, P, mask


class GroupedLoraLinear(torch.autograd.Function):
    """What `LoraLinear` is for one weight, of each expert's rows, factors and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, expert_offsets: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
        scaling: float, dropout_p: float, weight_args: WeightArgs,
    ) -> Tensor:  # fmt: skip
        y, P, mask = grouped_lora_forward(x, expert_offsets, lora_A, lora_B, bias, scaling, dropout_p, weight_args)
        ctx.save_for_backward(x, expert_offsets, mask, P, lora_A, lora_B, *weight_args[:6])
        ctx.sizes, ctx.scaling, ctx.dropout_scale = sizes_of(x, weight_args), scaling, 1 / (1 - dropout_p)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        if not is_differentiated_again():  # by ops alone, which autocast does not touch
            return _grouped_lora_gradients(ctx, dy)
        with without_autocast(dy.device):
            return _composed_grouped_lora_gradients(ctx, dy)


def _grouped_lora_gradients(ctx: Any, dy: Tensor) -> Gradients:
    x, offsets, mask, P, lora_A, lora_B, *weight = ctx.saved_tensors
    need_x, _, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
    scaling: float = ctx.scaling
    dx = dA = dB = dbias = None
    if need_x or need_A:
        Q = _grouped_lora_inner(dy, offsets, _lora_factor(lora_B, dy.dtype), True)  # [T, r]
    if need_x:
        A = _lora_factor(lora_A, dy.dtype)
        if mask is None:
            dx = _grouped_linear_dgrad(dy, offsets, *weight, *ctx.sizes, Q, A, scaling)
        else:  # the mask is on Q @ A alone
            dx = _grouped_linear_dgrad(dy, offsets, *weight, *ctx.sizes)
            term = _grouped_lora_inner(Q, offsets, A, True)
            dx += torch.ops.aten.native_dropout_backward(term, mask, scaling * ctx.dropout_scale)
    if need_A:
        dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, ctx.dropout_scale)
        dA = _grouped_lora_grad(Q, dropped, offsets, scaling, _gradient_dtype(lora_A)).to(lora_A.dtype)
    if need_B:
        dB = _grouped_lora_grad(P, dy, offsets, scaling, _gradient_dtype(lora_B), True).to(lora_B.dtype)
    if need_bias:
        dbias = sums_of_rows(dy, offsets, False)
    return dx, None, dA, dB, dbias, None, None, None


def _composed_grouped_lora_gradients(ctx: Any, dy: Tensor) -> Gradients:
    """The same by differentiable operations, P computed again."""
    x, offsets, mask, _, lora_A, lora_B, *weight = ctx.saved_tensors
    A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    membership = membership_of(offsets, dy.shape[0])
    kept = None if mask is None else mask.to(dy.dtype) * ctx.dropout_scale
    dropped = x if kept is None else kept * x
    P, Q = _inner_of_all(dropped, A, membership), _inner_of_all(dy, B.mT, membership)
    term = ctx.scaling * (Q @ A.flatten(0, 1))
    dx = Product.apply(dy, offsets, (*weight, *ctx.sizes), True)
    dx = dx + (term if kept is None else kept * term)
    dA = _outer(Q, dropped, ctx.scaling, lora_A).unflatten(0, A.shape[:2])
    dB = _outer(P, dy, ctx.scaling, lora_B).unflatten(0, A.shape[:2]).mT
    gradients = (dx, None, dA, dB, sums_of_rows(dy, offsets, True))
    needed = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad))
    return *needed, None, None, None


def composed_grouped_lora_linear(
    x: Tensor, expert_offsets: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None,
    scaling: float, dropout_p: float, weight_args: WeightArgs,
) -> Tensor:  # fmt: skip
    """`GroupedLoraLinear` and `GroupedLinear` for every transform and derivative; each term is rounded to x's dtype."""
    y: Tensor = Product.apply(x, expert_offsets, weight_args, False)
    membership = membership_of(expert_offsets, x.shape[0])
    if lora_A is not None and lora_B is not None:
        dropped = torch.nn.functional.dropout(x, dropout_p) if dropout_p > 0 else x
        P = _inner_of_all(dropped, lora_A.to(x.dtype), membership)
        y = y + scaling * (P @ lora_B.to(x.dtype).mT.flatten(0, 1))
    return y if bias is None else y + membership.to(x.dtype) @ bias


def _inner_of_all(x: Tensor, factors: Tensor, membership: Tensor) -> Tensor:
    """[T, E * r]: x @ factors[e].T of the row's own expert, zeros at the others; factors [E, r, D].

    All experts' are taken and those of other experts zeroed: E times the arithmetic, and plain autograd in return.
    """
    inner = (x @ factors.flatten(0, 1).mT).unflatten(-1, factors.shape[:2])
    return torch.where(membership[:, :, None], inner, 0).flatten(1)


def _lora_factor(lora: Tensor, dtype: torch.dtype) -> Tensor:
    """A LoRA factor as the op wants it; calls that return the tensor itself would take 1.5 us of a token's call."""
    if lora.dtype == dtype and lora.is_contiguous():
        return lora
    return lora.to(dtype).contiguous()


def _outer(a: Tensor, b: Tensor, scaling: float, lora_factor: Tensor) -> Tensor:
    """scaling * a.T @ b over the rows, as the gradient of lora_factor."""
    a, b = (as_matrix(t).to(lora_factor.dtype) for t in (a, b))
    return scaling * a.T @ b


def _lora_inner(x: Tensor, lora_factor: Tensor, transposed: bool = False) -> Tensor:
    """x @ lora_factor.T, `[M, r]`, of a factor [r, D]; transposed, x @ lora_factor of one [D, r]."""
    x = as_matrix(x)
    if _multiplies_as_one_expert(x):
        return _grouped_lora_inner(x, _one_group(x), lora_factor.contiguous()[None], transposed)
    # of a copy where x's layout is odd, since a BLAS may sum it in another order
    return x.contiguous() @ (lora_factor if transposed else lora_factor.T)


def _one_group(x: Tensor) -> Tensor:
    """The expert_offsets of a single expert that has all rows."""
    # a fake tensor meets none that is real
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.shape[0] > FEW_ROWS:
        return torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
    return _ENDS[x.shape[0]]


def _multiplies_as_one_expert(x: Tensor) -> bool:
    """Whether LoRA's inner product of a single weight runs on the experts' kernels, which no BLAS of a CPU is near.

    At M = 512 torch takes 1.5 to 2 times as long in fp32, and in bf16 1.6 times as long with the CPU's bf16
    instructions, 3 (forward) to 43 times (backward) without (r = 16, D from 576 to 4096, two Zen 4 cores). One row in
    fp32 is quicker by torch, by the 2 us that a call of the op costs more.
    """
    return x.is_cpu and (x.shape[0] != 1 or x.dtype != torch.float32)


def _lora_outer(Q: Tensor, A: Tensor) -> Tensor:
    """Q @ A, `[M, K]`; by our kernels where torch has no quick product of 16 bits, which takes 25 to 50 times as long.

    Elsewhere torch is up to 2.3 times as quick: r terms of a sum leave a kernel little to do but write.
    """
    if not Q.is_cpu or Q.dtype == torch.float32:
        return Q @ A
    if Q.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and select.cpu_multiplies_bf16():
        return Q @ A
    return _lora_inner(Q, A, True)


def _gradient_dtype(lora: Tensor) -> torch.dtype:
    return lora.dtype if lora.dtype in WEIGHT_DTYPES else torch.float32
