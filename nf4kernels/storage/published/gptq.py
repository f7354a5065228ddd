"""Symmetric INT4 as GPTQ and AutoRound pack it: transposed, with a zero point of 8 for every group.

`qweight` int32 `[K/8, N]`, eight rows a word; `scales` `[groups, N]`; `qzeros` int32 `[groups, N/8]`, which the first
version of the layout stores less 1; `g_idx` int32 `[K]`, each column's group, sorted unless act-order permuted them.
"""

import torch
from torch import Tensor

from ...quantized_weight import QuantizedWeight
from .int4 import symmetric_weight
from .nibbles import bytes_of_words

EIGHT = {1: 0x77777777, 2: -0x77777778}  # eight zero points of 8 in a word, by version


def weight_from_gptq(
    qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, group_size: int, version: int,
    dtype: torch.dtype,
) -> QuantizedWeight:  # fmt: skip
    """`[N, K]`; group_size -1 is a row.

    ValueError for other shapes or bits, for a zero point that is not 8, and for NaN among the scales.
    """
    if qweight.dtype != torch.int32 or qweight.dim() != 2:
        raise ValueError(f"qweight must be int32 [K/8, N], got {qweight.dtype} {list(qweight.shape)}")
    K, N = qweight.shape[0] * 8, qweight.shape[1]
    if g_idx is not None and g_idx.numel() != K:
        raise ValueError(f"qweight must hold 4 bits for each of the {g_idx.numel()} columns of g_idx, got {K} codes")
    group_size = K if group_size == -1 else group_size
    groups = -(-K // group_size)
    if tuple(scales.shape) != (groups, N):
        raise ValueError(f"scales must have shape {[groups, N]}, got {list(scales.shape)}")
    if qzeros.dtype != torch.int32 or N % 8 or tuple(qzeros.shape) != (groups, N // 8):
        expected = f"int32 [{groups}, {N}/8]"
        raise ValueError(f"qzeros must be {expected}, got {qzeros.dtype} {list(qzeros.shape)}")
    if not qzeros.is_meta and (qzeros != EIGHT[version]).any():
        raise ValueError(
            "qzeros must be 8 everywhere (symmetric), got others, which a level times a scale cannot hold: quantize the"
            " 16-bit model to NF4 instead (nf4kernels quantize)"
        )
    packed = bytes_of_words(qweight.t())
    return symmetric_weight(packed, scales.t(), group_size, g_idx, dtype)
