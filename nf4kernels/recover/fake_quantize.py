"""Fake quantization: a dense weight takes the values that its 4-bit form has, and is trained straight through them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..functional import dequantize, linear_from_args, quantize
from ..modes import autocast_is_on
from ..nn.lora import LoraConfig, init_adapter
from ..nn.quant_linear import QuantLinear
from ..quantized_weight import WEIGHT_DTYPES, QuantizedWeight

_linear_dgrad = torch.ops.nf4kernels.linear_dgrad.default
Options = Mapping[str, Any]  # of `nf4kernels.quantize`
Factors = tuple[Tensor | None, Tensor | None, float]  # lora_A [r, K], lora_B [N, r], scaling


def fake_quantize(weight: Tensor, clip: bool = False, **quant_options) -> Tensor:
    """dequantize(quantize(weight)), bit for bit, in weight's dtype and shape; its gradient is the weight's own.

    The straight-through estimator (arXiv 1308.3432, section 4): the derivative of the rounding is taken to be 1. Scales
    are rounded as well, where they are double-quantized; that they depend on the weight is left out of the gradient.

    Args:
        weight: `[N, K]`, float32, bfloat16 or float16.
        clip: no gradient for a weight beyond the outermost level of its block, which moving on would not change. With
            a block's largest weight as its scale there are few: those that saturate in mxfp4, nvfp4, int4_symmetric
            and codebooks that end before 1, and the largest of blocks whose double-quantized scale was rounded down.
        quant_options: as in `nf4kernels.quantize`.

    Raises:
        TypeError, ValueError: as `nf4kernels.quantize`.
    """
    fake: Tensor = _StraightThrough.apply(weight, clip, quant_options)
    return fake


def beyond_levels(weight: Tensor, qweight: QuantizedWeight) -> Tensor:
    """bool `[N, K]`: whether a weight is outside the outermost levels that its block has in `qweight`."""
    ends = [17 * int(each) for each in (qweight.code.argmin(), qweight.code.argmax())]  # in both nibbles
    bounds = [
        dequantize(replace(qweight, packed=torch.full_like(qweight.packed, end)), torch.float32)
        for end in (ends if qweight.bits == 4 else (129, 127))  # -127, since -128 is never written, and 127
    ]
    w = weight.float()
    return (w < torch.minimum(*bounds)) | (w > torch.maximum(*bounds))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, clip: bool, options: Options) -> Tensor:
        qweight = quantize(weight, **options)
        ctx.options = options if clip else None
        if clip:
            ctx.save_for_backward(weight)
        return dequantize(qweight, weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.options is not None:
            (weight,) = ctx.saved_tensors
            grad = grad.masked_fill(beyond_levels(weight, quantize(weight, **ctx.options)), 0)
        return grad, None, None


def merged_weight(weight: Tensor, factors: Factors) -> Tensor:
    """W + scaling * B @ A, in fp32 also under autocast, rounded once to W's dtype; W itself without factors."""
    A, B, scaling = factors
    if A is None or B is None:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.float(), B.float(), A.float(), alpha=scaling).to(weight.dtype)


class _Product(torch.autograd.Function):
    """y = x @ Ŵ.T + bias with Ŵ = dequantize(quantize(W + s B A)): the product of the layer that it becomes.

    dx = dy @ Ŵ; straight through, dW = dy.T @ x, so that dA = s Q.T @ x and dB = s dy.T @ P with Q = dy @ B,
    P = x @ A.T, and no matrix of W's size but with `clip`. Ŵ is never in memory, and its 4 bits are made again in
    backward: kept, those of all layers would be there at once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, bias: Tensor | None, scaling: float,
        clip: bool, options: Options,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, A, B)
        ctx.scaling, ctx.clip, ctx.options = scaling, clip, options
        qweight = quantize(merged_weight(weight, (A, B, scaling)), **options)
        return linear_from_args(x, qweight.op_args(), bias, "nf4kernels.recover.FakeQuantLinear")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, A, B = ctx.saved_tensors
    need_x, need_weight, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
    dx = dweight = dA = dB = None
    qweight: Any = None
    merged: Any = None
    if need_x or ctx.clip:
        merged = merged_weight(weight, (A, B, ctx.scaling))
        qweight = quantize(merged, **ctx.options)
    if need_x:
        dx = _linear_dgrad(dy, *qweight.op_args())
    rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if need_weight or (ctx.clip and (need_A or need_B)):
        dweight = rows.mT @ x_rows  # [N, K]
        if ctx.clip:
            dweight = dweight.masked_fill_(beyond_levels(merged, qweight), 0)
    if need_A:
        B16 = B.to(dy.dtype)
        dA = (B16.mT @ dweight if dweight is not None else (rows @ B16).mT @ x_rows).mul_(ctx.scaling).to(A.dtype)
    if need_B:
        A16 = A.to(dy.dtype)
        dB = (dweight @ A16.mT if dweight is not None else rows.mT @ (x_rows @ A16.mT)).mul_(ctx.scaling).to(B.dtype)
    dbias = rows.sum(0) if need_bias else None
    dweight = dweight.to(weight.dtype) if dweight is not None and need_weight else None
    return dx, dweight, dA, dB, dbias, None, None, None


class FakeQuantLinear(nn.Linear):
    """y = x @ Ŵ.T + bias, Ŵ the 4-bit form of `weight`, made anew in each call; trained as an nn.Linear is.

    Forward is the product of the QuantLinear that `convert_qat` makes of the layer, to the bit, and the weight is
    rounded from the dtype that it has: of an fp32 master weight the fp32 values, whatever autocast does to x.
    Parameters and state are nn.Linear's (the weight itself, shared); with an adapter there are `lora_A` and `lora_B`
    beside a frozen weight, in fp32, and Ŵ is the 4-bit form of W + scaling * B @ A in W's dtype.

    Args:
        linear: the layer whose parameters it shares.
        lora: train an adapter that is merged before it is rounded; None trains the weight.
        clip: as in `fake_quantize`.
        compute_dtype, quant_options: as in `QuantLinear.from_linear`.

    Raises:
        TypeError, ValueError: as `nf4kernels.quantize`; or `lora` has dropout, which no merged weight has, or starts
            from the weight, which is what makes it another.
    """

    def __init__(
        self,
        linear: nn.Linear,
        lora: LoraConfig | None = None,
        clip: bool = False,
        compute_dtype: torch.dtype | None = None,
        **quant_options,
    ) -> None:
        nn.Module.__init__(self)
        check_lora_merged(lora, "nf4kernels.recover.FakeQuantLinear")
        quantize(linear.weight, **quant_options)  # every check
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora, self.clip, self.compute_dtype, self.quant_options = lora, clip, compute_dtype, quant_options
        self.lora_A = self.lora_B = None
        if lora is not None:
            like: dict[str, Any] = {"bias": False, "device": linear.weight.device, "dtype": torch.float32}
            self.lora_A = nn.Linear(self.in_features, lora.r, **like)
            self.lora_B = nn.Linear(lora.r, self.out_features, **like)
            init_adapter(self.lora_A, self.lora_B, lora)
            self.weight.requires_grad_(False)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        in_dtype = x.dtype
        if autocast_is_on(x.device):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            in_dtype = x.dtype
        elif self.compute_dtype is not None and in_dtype in WEIGHT_DTYPES:
            x = x.to(self.compute_dtype)
        return self._product(x).to(in_dtype)

    def _product(self, x: Tensor) -> Tensor:
        A, B, scaling = self.factors
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = _Product.apply(x, self.weight, A, B, bias, scaling, self.clip, self.quant_options)
        return y

    @property
    def factors(self) -> Factors:
        if self.lora is None or self.lora_A is None or self.lora_B is None:
            return None, None, 1.0
        return self.lora_A.weight, self.lora_B.weight, self.lora.scaling

    @torch.no_grad()
    def merged(self) -> Tensor:
        """`[N, K]` in the weight's dtype, what is rounded: the weight itself where there is no adapter."""
        return merged_weight(self.weight.detach(), self.factors)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ `[N, K]`, in the weight's dtype where none is given."""
        return dequantize(quantize(self.merged(), **self.quant_options), self.weight.dtype if dtype is None else dtype)

    def to_linear(self) -> nn.Linear:
        """The dense layer with the weight before its rounding, merged; it shares what needs no merging."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = self.weight if self.lora is None else nn.Parameter(self.merged())
        dense.bias = self.bias
        return dense.train(self.training)

    def to_quant_linear(self) -> QuantLinear:
        """The layer in 4 bits, without an adapter: its `dequantize` is this one's, bit for bit."""
        qweight = quantize(self.merged(), **self.quant_options)
        return QuantLinear.from_quantized(qweight, self.bias, self.compute_dtype).train(self.training)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.quant_options.items() if value is not None)
        return f"{super().extra_repr()}{options}" + ("" if self.lora is None else f", lora_r={self.lora.r}")


def check_lora_merged(lora: LoraConfig | None, who: str) -> None:
    if lora is None:
        return
    if not isinstance(lora, LoraConfig):
        raise TypeError(f"{who}: lora_merged must be a LoraConfig or None, got {type(lora).__name__}")
    if lora.dropout:
        raise ValueError(f"{who}: lora_merged must have dropout 0, since it is merged, got {lora.dropout}")
    if lora.init not in ("default", "gaussian"):
        raise ValueError(f"{who}: lora_merged must start at zero (default, gaussian), got init={lora.init!r}")
