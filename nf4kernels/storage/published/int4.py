"""Symmetric INT4 as compressed-tensors packs it: code i is i - 8, scales in 16 or 32 bits for groups, rows or all.

`weight_packed` int32 `[N, K/8]`, eight codes a word from the low bits on; `weight_scale` `[N, groups]`, `[N, 1]` or
`[1]`; `weight_shape`; and where activation order was kept, `weight_g_idx` int `[K]`, each column's group.
"""

import torch
from torch import Tensor

from ...codebook import INTEGERS
from ...quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from .nibbles import bytes_of_words, check_finite, columns_taken, order_of_groups, scales_of_blocks


def weight_from_packed(
    words: Tensor, scales: Tensor, shape: Tensor | None, group_of_column: Tensor | None, dtype: torch.dtype
) -> QuantizedWeight:
    """`[N, K]`; ValueError for other shapes and for NaN among the scales."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"weight_packed must be int32 [N, K/8], got {words.dtype} {list(words.shape)}")
    N, K = words.shape[0], words.shape[1] * 8
    if shape is not None and shape.tolist() != [N, K]:
        raise ValueError(f"weight_packed must hold the {shape.tolist()} of weight_shape, got {[N, K]}")
    if scales.dim() < 2:
        scales = scales.reshape(-1, 1).expand(N, -1)
    if scales.dim() != 2 or scales.shape[0] != N or not scales.shape[1] or K % scales.shape[1]:
        raise ValueError(f"weight_scale must be [{N}, groups], got {list(scales.shape)}")
    return symmetric_weight(bytes_of_words(words), scales, K // scales.shape[1], group_of_column, dtype)


def symmetric_weight(
    packed: Tensor, scales: Tensor, group_size: int, group_of_column: Tensor | None, dtype: torch.dtype
) -> QuantizedWeight:
    """The same of packed bytes `[N, K/2]` in our order and scales `[N, groups]`."""
    N, K = packed.shape[0], packed.shape[1] * 2
    if scales.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"the scales must be float32, bfloat16 or float16, got {scales.dtype}")
    check_finite(scales, "the scales")
    order = None
    if group_of_column is not None:
        order = order_of_groups(group_of_column, group_size, "g_idx")
    if order is not None:
        order = order.to(packed.device)
        packed = columns_taken(packed, order)
    absmax, block_size = scales_of_blocks(scales, K, group_size, "the scales")
    code = INTEGERS.to(packed.device, copy=True)
    return QuantizedWeight(
        packed.contiguous(), absmax, None, None, code, None, (N, K), dtype, block_size, "int4_symmetric", None,
        order,
    )  # fmt: skip
