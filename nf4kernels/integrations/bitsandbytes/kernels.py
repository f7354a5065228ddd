"""The kernels of `torch.ops.bitsandbytes` for 4-bit weights: each op, with its own arguments, on ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...quantized_weight import SUPERBLOCK
from .quant_state import WHO, as_bytes, code_of, matrix_shape

_ops: Any = torch.ops.nf4kernels


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    matrix = A if A.dim() == 2 else A.reshape(1, -1)
    packed, absmax = _ops.quantize(matrix, code_of(quant_type, A.device), blocksize)
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"{WHO}: quant_storage must divide the packed bytes, got {quant_storage} for {packed.numel()} bytes"
        )
    return packed.view(-1).view(quant_storage).view(-1, 1), absmax.view(-1)


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    N, K = matrix_shape(shape)
    weight = _weight(A, absmax, code_of(quant_type, A.device), (N, K), blocksize)
    values: Tensor = _ops.dequantize(*weight, 0, N, 0, K, dtype)
    return values.view(*shape)


def dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype:
        raise ValueError(f"{WHO}: out must be {dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if not out.is_contiguous():
        out.copy_(dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))
        return
    N, K = matrix_shape(shape)
    weight = _weight(A, absmax, code_of(quant_type, A.device), (N, K), blocksize)
    _ops.dequantize_out(*weight, 0, N, 0, K, out.view(N, K))


def gemm_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, blocksize: int, quant_type: str,
    bias: Tensor | None = None, absmax_8bit: Tensor | None = None, absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """With nested scales `absmax` is that of the scales, and `absmax_8bit` are the scales."""
    code = code_of(quant_type, A.device)
    if absmax_8bit is None:
        return _ops.linear(A, *_weight(B, absmax, code, shapeB, blocksize), bias)
    offset = None if absmax_offset is None else absmax_offset.float()
    nested = (absmax_8bit.contiguous(), absmax.contiguous(), offset, code, absmax_code)
    return _ops.linear(A, as_bytes(B), *nested, *shapeB, blocksize, bias)


def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    if code.numel() != 16:
        code = code_of("fp4" if code[1] > 0 else "nf4", A.device)
    y: Tensor = _ops.linear(A, *_weight(B, absmax, code.float(), shapeB, blocksize), None)
    return y


def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def _weight(packed: Tensor, absmax: Tensor, code: Tensor, shape: Sequence[int], blocksize: int) -> tuple:
    """As `WeightArgs`, with fp32 scales."""
    if absmax.dtype == torch.bfloat16:
        raise RuntimeError(
            f"{WHO}: absmax must be float32, got bfloat16, as of a weight that bitsandbytes repacked for this CPU"
            " before patch(): call patch() before the first forward, or load the weight again"
        )
    return as_bytes(packed), absmax.float().contiguous(), None, None, code, None, *shape, blocksize


class ScalesKernel:
    """`quantize_blockwise` for what nests scales, fp32 in blocks of 256: the nearest level of an ascending map.

    On the CPU bitsandbytes' own kernel is some levels off for one scale in 500. It stays what runs for all else.
    """

    def __init__(self, key: str) -> None:
        self._theirs = torch.library.get_kernel("bitsandbytes::quantize_blockwise", key)

    def __call__(self, keyset: Any, A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        if blocksize == SUPERBLOCK and A.dtype == torch.float32 and code.shape == (256,) and (code.diff() > 0).all():
            return quantize_scales(A, code)
        return self._theirs.call_boxed(keyset, A, code, blocksize)


def quantize_scales(A: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """(index, absmax): the lower level on a tie."""
    blocks = torch.nn.functional.pad(A.reshape(-1), (0, -A.numel() % SUPERBLOCK)).view(-1, SUPERBLOCK)
    absmax = blocks.abs().amax(1) if A.numel() else blocks.new_zeros(0)
    scaled = blocks * (1 / absmax.clamp(min=2.0**-100))[:, None]
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8)
    return index.view(-1)[: A.numel()].view(A.shape), absmax


KERNELS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit.out": dequantize_4bit_out,
    "gemm_4bit": gemm_4bit,
    "gemv_4bit": gemv_4bit,
    "gemv_4bit.out": gemv_4bit_out,
}
