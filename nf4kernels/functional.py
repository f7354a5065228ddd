"""quantize, dequantize, linear, lora_linear: the ops with checks, defaults and gradients. Of experts: grouped.py."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import codebook as codebooks
from . import ops  # noqa: F401 (defines what the next lines hold)
from .autograd import Linear, composed_linear
from .autograd_lora import LoraLinear, composed_lora_linear, lora_forward
from .input_checks import check_input, check_lora, check_weight
from .modes import is_transformed, outside_inference_mode
from .published_formats import WRITERS, quantize_as
from .quantized_weight import (
    WEIGHT_DTYPES,
    QuantizedExperts,
    QuantizedWeight,
    WeightArgs,
    check_block_size,
    check_expert_columns,
    check_plain,
    expert_specs,
    shared_codebooks,
)

_ops = torch.ops.nf4kernels
# Each lookup would cost every call 0.1 us.
_linear: Callable[..., Tensor] = _ops.linear.default


@outside_inference_mode
def quantize(
    weight: Tensor,
    codebook: str | Tensor = "nf4",
    block_size: int | None = None,
    double_quant: bool = True,
    scale_codebook: str = "e4m3",
    nonfinite: str = "raise",
) -> QuantizedWeight:
    """The nearest 4-bit code of weight / absmax, block by block; the scales to 8 bits in groups of 256 blocks.

    Of "int8" the nearest integer to 127 weight / absmax, ties to the even one; the scale is absmax / 127.

    Args:
        weight: `[N, K]`, float32, bfloat16 or float16, any strides. A non-contiguous weight is copied.
        codebook: "nf4", "fp4", "int4", "af4", or 16 ascending levels in [-1, 1]; or "int8", the integers from -127 to
            127, a byte a weight (8.127 bits, or 8.5 without double_quant); or "mxfp4", "nvfp4" or "int4_symmetric",
            which round as their formats say and have scales of their own: double_quant and scale_codebook do not
            concern them, and nonfinite must be "raise".
        block_size: consecutive weights that share a scale, a power of two from 16 to 4096. None is the codebook's own:
            32 for mxfp4 and 16 for nvfp4, which take no other, and else 64.
        double_quant: store the scales in 8 bits (4.127 bits a weight at block size 64, instead of 4.5).
        scale_codebook: "e4m3" or "dynamic8" (bitsandbytes' map); used with `double_quant`.
        nonfinite: "raise", or "propagate": a block that holds NaN or inf decodes to NaN (needs `double_quant=False`).

    Returns:
        The quantized weight, on weight's device, detached.

    Raises:
        TypeError: weight is not a float32, bfloat16 or float16 tensor, or codebook is not a name or a float tensor.
        ValueError: any other argument is out of its range, or weight holds NaN or inf (first row and column named).

    Source: QLoRA (arXiv 2305.14314), sections 2 and 3.
    """
    who = "nf4kernels.quantize"
    if not isinstance(weight, Tensor) or weight.dtype not in WEIGHT_DTYPES:
        came = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{who}: weight must be a float32, bfloat16 or float16 tensor, got {came}")
    check_plain(weight, who)
    if weight.dim() != 2:
        raise ValueError(f"{who}: weight must be 2-D [N, K], got shape {list(weight.shape)}")
    if nonfinite not in ("raise", "propagate"):
        raise ValueError(f"{who}: nonfinite must be 'raise' or 'propagate', got {nonfinite!r}")
    if nonfinite == "propagate" and double_quant:
        raise ValueError(f"{who}: nonfinite='propagate' must go with double_quant=False, got double_quant=True")
    block_size = codebooks.default_block_size(codebook) if block_size is None else block_size
    check_block_size(block_size, who)
    name, code = codebooks.resolve(codebook, who)
    if name in codebooks.FORMATS:
        return _quantize_as(name, weight, block_size, nonfinite, who)
    scale_code = codebooks.resolve_scale(scale_codebook, who).to(weight.device) if double_quant else None

    code = code.to(weight.device)
    packed, absmax = _ops.quantize(weight.detach(), code, block_size)
    # A scale is finite or NaN, and the maximum keeps a NaN: isfinite().all() takes 30 times as long.
    if nonfinite == "raise" and not weight.is_meta and absmax.numel() and not absmax.amax().isfinite():
        _refuse_nonfinite(weight, who)
    scale_absmax = scale_offset = None
    if double_quant:
        absmax, scale_absmax, scale_offset = _ops.quantize_absmax(absmax, scale_code, scale_codebook == "e4m3")
    return QuantizedWeight(
        packed, absmax, scale_absmax, scale_offset, code, scale_code, tuple(weight.shape), weight.dtype, block_size,
        name, scale_codebook if double_quant else None,
    )  # fmt: skip


def _quantize_as(name: str, weight: Tensor, block_size: int, nonfinite: str, who: str) -> QuantizedWeight:
    """In a format that has a rule of its own."""
    own = codebooks.FORMATS[name].block_size
    if name not in WRITERS:
        raise ValueError(f"{who}: codebook must be one that is written, got {name!r}, which is read from files alone")
    if own is not None and block_size != own:
        raise ValueError(f"{who}: block_size must be {own} with codebook={name!r}, got {block_size}")
    if nonfinite != "raise":
        raise ValueError(f"{who}: nonfinite must be 'raise' with codebook={name!r}, got {nonfinite!r}")
    weight = weight.detach()
    if not weight.is_meta and weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
        _refuse_nonfinite(weight, who)
    return quantize_as(name, weight, block_size)


def _refuse_nonfinite(weight: Tensor, who: str) -> NoReturn:
    row, col = (~weight.isfinite()).nonzero()[0].tolist()
    raise ValueError(f"{who}: weight must be finite, got {weight[row, col].item()} at row {row}, column {col}")


@outside_inference_mode
def quantize_experts(
    weight: Tensor,
    codebook: str | Tensor = "nf4",
    block_size: int | None = None,
    double_quant: bool = True,
    scale_codebook: str = "e4m3",
    nonfinite: str = "raise",
) -> QuantizedExperts:
    """`quantize` of each of the E matrices: the same bits, stacked.

    Args:
        weight: `[E, N, K]`, float32, bfloat16 or float16, any strides; K a multiple of 64 and of block_size. One expert
            at a time is copied where it is not contiguous.
        codebook, block_size, double_quant, scale_codebook, nonfinite: as in `quantize`.

    Returns:
        The quantized experts, on weight's device, detached.

    Raises:
        TypeError, ValueError: as `quantize`; the message names the expert that holds NaN or inf.
    """
    who = "nf4kernels.quantize_experts"
    if not isinstance(weight, Tensor):
        raise TypeError(f"{who}: weight must be a tensor, got {type(weight).__name__}")
    check_plain(weight, who)
    if weight.dim() != 3:
        raise ValueError(f"{who}: weight must be 3-D [E, N, K], got shape {list(weight.shape)}")
    block_size = codebooks.default_block_size(codebook) if block_size is None else block_size
    check_block_size(block_size, who)
    check_expert_columns(weight.shape[2], block_size, who)
    options = (codebook, block_size, double_quant, scale_codebook, nonfinite)
    like = quantize(weight.new_empty((0, weight.shape[2])), *options)  # every check, and the codebooks
    E, N, K = weight.shape
    shared = {name: getattr(like, name) for name in shared_codebooks(like.scales)}
    own: dict[str, Any] = {
        name: None if dtype is None else weight.new_empty(shape, dtype=dtype)
        for name, (dtype, shape) in expert_specs(E, N, K, block_size, like.scales, like.code.numel()).items()
        if name not in shared
    }
    for expert, matrix in enumerate(weight.detach()):
        try:
            qweight = quantize(matrix, *options)
        except ValueError as error:
            raise ValueError(f"{who}: expert {expert}: {error}") from None
        for name, tensor in own.items():
            if tensor is not None:
                tensor[expert] = getattr(qweight, name)
    return QuantizedExperts(
        **own, **shared, shape=tuple(weight.shape), dtype=weight.dtype,
        block_size=block_size, codebook=like.codebook, scale_codebook=like.scale_codebook,
    )  # fmt: skip


def dequantize(
    qweight: QuantizedWeight,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
) -> Tensor:
    """Ŵ[rows, cols] = code[code of it] * scale in fp32, rounded once to dtype.

    Args:
        qweight: the `[N, K]` weight.
        dtype: float32, bfloat16 or float16; ignored where `out` is given.
        out: the tensor to write into, of the result's shape, contiguous in its last dimension.
        rows, cols: half-open ranges; None is all.

    Returns:
        `out`, or a new contiguous tensor.

    Raises:
        TypeError: dtype or out's dtype is none of the three, or qweight is no QuantizedWeight.
        ValueError: a range outside the weight, or out of another shape, device or layout.
    """
    who = "nf4kernels.dequantize"
    check_weight(qweight, who)
    dtype = dtype if out is None else out.dtype
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: {'dtype' if out is None else 'out'} must be float32, bfloat16 or float16, got {dtype}")
    bounds = []
    for name, span, size in (("rows", rows, qweight.shape[0]), ("cols", cols, qweight.shape[1])):
        begin, end = (0, size) if span is None else span
        if not 0 <= begin <= end <= size:
            raise ValueError(f"{who}: {name} must be a range within 0..{size}, got {span}")
        bounds += [begin, end]
    if out is None:
        if qweight.column_order is not None:
            return _in_order(qweight, bounds, dtype)
        values: Tensor = _ops.dequantize(*qweight.op_args(), *bounds, dtype)
        return values
    shape = (bounds[1] - bounds[0], bounds[3] - bounds[2])
    if out.shape != shape:
        raise ValueError(f"{who}: out must have shape {list(shape)}, got {list(out.shape)}")
    if out.device != qweight.device:
        raise ValueError(f"{who}: out must be on {qweight.device}, got {out.device}")
    if out.numel() and out.stride(1) != 1:
        raise ValueError(f"{who}: out must be contiguous in its last dimension, got strides {list(out.stride())}")
    if out.numel() and shape[0] > 1 and out.stride(0) < shape[1]:
        raise ValueError(f"{who}: out must have rows that do not overlap, got strides {list(out.stride())}")
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError(f"{who}: out must not require a gradient, got one that does")
    if qweight.column_order is not None:
        return out.copy_(_in_order(qweight, bounds, dtype))
    _ops.dequantize_out(*qweight.op_args(), *bounds, out)
    increment_version(out)  # so that autograd refuses a backward through what out held before
    return out


def _in_order(qweight: QuantizedWeight, bounds: list[int], dtype: torch.dtype) -> Tensor:
    """That range of Ŵ whose columns the bytes have in another order: whole rows are decoded."""
    order, K = qweight.column_order, qweight.shape[1]
    values: Tensor = _ops.dequantize(*qweight.op_args(), *bounds[:2], 0, K, dtype)
    ordered = torch.empty_like(values)
    ordered[:, order] = values
    return ordered[:, bounds[2] : bounds[3]].contiguous()


def take_columns(x: Tensor, order: Tensor | None, K: int) -> Tensor:
    """`[..., K]` with its columns as the bytes have Ŵ's; x of another width as it is, for the op to refuse."""
    return x if order is None or x.shape[-1:] != (K,) else x.index_select(-1, order)


def dequantize_rows_from_args(weight_args: WeightArgs, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`dequantize` of a half-open range of rows, on the weight's op arguments."""
    values: Tensor = _ops.dequantize(*weight_args, *rows, 0, weight_args[7], dtype)
    return values


def linear(x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ Ŵ.T + bias, without writing Ŵ to memory; differentiable in x and bias.

    Any number of times, and by torch.func's transforms (vmap over all but the weight), which add bias after rounding.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16, any strides. A non-contiguous x is copied. Under autocast x is
            first cast to autocast's dtype.
        qweight: the `[N, K]` weight.
        bias: `[N]`, cast to x's dtype, or None.

    Returns:
        `[..., N]` in x's dtype; products are summed in fp32. A float32 x is computed in true fp32.

    Raises:
        TypeError: x is of another dtype, or qweight is no QuantizedWeight.
        ValueError: a shape does not fit, or the tensors are on different devices.
    """
    check_weight(qweight, "nf4kernels.linear")
    x = take_columns(x, qweight.column_order, qweight.shape[1])
    return linear_from_args(x, qweight.op_args(), bias, "nf4kernels.linear")


def lora_linear(
    x: Tensor,
    qweight: QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x @ Ŵ.T + scaling * dropout(x) @ lora_A.T @ lora_B.T + bias; differentiable in x, lora_A, lora_B and bias.

    Any number of times, and by torch.func's transforms (vmap over all but the weight); these, and a backward that is
    itself recorded, round each term to x's dtype before they add them.

    Saved for backward: x, the packed weight, lora_A, lora_B, the LoRA inner product `[M, r]`, and the dropout mask.

    Args:
        x, qweight, bias: as in `linear`.
        lora_A: `[r, K]`; lora_B: `[N, r]`. Cast to x's dtype for the product; their gradients come in their own.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout_p: probability of zeroing an element of x on the LoRA path, in [0, 1).

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        TypeError: x is not float32, bfloat16 or float16, or qweight is no QuantizedWeight.
        ValueError: a shape does not fit, dropout_p is out of range, or the tensors are on different devices.

    Source: LoRA (arXiv 2106.09685), section 4.1; QLoRA (arXiv 2305.14314), equation 5.
    """
    check_weight(qweight, "nf4kernels.lora_linear")
    K, order = qweight.shape[1], qweight.column_order
    x, lora_A = take_columns(x, order, K), take_columns(lora_A, order, K)
    return lora_linear_from_args(x, qweight.op_args(), lora_A, lora_B, scaling, bias, dropout_p)


def linear_from_args(x: Tensor, weight_args: WeightArgs, bias: Tensor | None, who: str) -> Tensor:
    """`linear` on the weight's op arguments, for callers that hold the tensors themselves."""
    x, bias = check_input(x, weight_args, bias, who)
    if is_transformed(x, bias):
        return composed_linear(x, bias, weight_args)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = Linear.apply(x, bias, weight_args)
        return y
    return _linear(x, *weight_args, bias)


def lora_linear_from_args(
    x: Tensor,
    weight_args: WeightArgs,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """`lora_linear` on the weight's op arguments."""
    who = "nf4kernels.lora_linear"
    x, bias = check_input(x, weight_args, bias, who)
    check_lora(x, lora_A, lora_B, dropout_p, weight_args[6:8], who)
    if is_transformed(x, lora_A, lora_B, bias):
        return composed_lora_linear(x, lora_A, lora_B, bias, scaling, dropout_p, weight_args)
    if torch.is_grad_enabled() and (
        x.requires_grad or lora_A.requires_grad or lora_B.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = LoraLinear.apply(x, lora_A, lora_B, bias, scaling, dropout_p, weight_args)
        return y
    return lora_forward(x, lora_A, lora_B, bias, scaling, dropout_p, weight_args)[0]
