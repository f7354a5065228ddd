"""NVFP4: E2M1 codes in blocks of 16, each with an E4M3 scale, and one fp32 scale a tensor.

Two layouts of the same numbers, the even element in the low nibble of both: modelopt's `weight`, `weight_scale` and
`weight_scale_2`, which multiplies, and compressed-tensors' `weight_packed`, `weight_scale` and `weight_global_scale`,
which divides.
"""

import torch
from torch import Tensor

from ...codebook import E2M1, e4m3_numbers
from ...quantized_weight import QuantizedWeight
from .nibbles import swapped

BLOCK = 16


def weight_from_packed(
    packed: Tensor, scales: Tensor, whole: Tensor, divides: bool, dtype: torch.dtype
) -> QuantizedWeight:
    """`[N, K]` of uint8 `[N, K/2]`, E4M3 `[N, K/16]` and one fp32; ValueError for other shapes or a NaN scale.

    scale_code[b] is fp32(E4M3(b) * whole), or fp32(E4M3(b) / whole) where whole `divides`, so that each entry is the
    product or quotient that the layout's own dequantizer takes.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] % (BLOCK // 2):
        raise ValueError(f"the packed weight must be uint8 [N, K/2], got {packed.dtype} {list(packed.shape)}")
    N, K = packed.shape[0], packed.shape[1] * 2
    if scales.dtype != torch.float8_e4m3fn or tuple(scales.shape) != (N, K // BLOCK):
        expected = f"float8_e4m3fn [{N}, {K // BLOCK}]"
        raise ValueError(f"weight_scale must be {expected}, got {scales.dtype} {list(scales.shape)}")
    codes = scales.contiguous().view(torch.uint8)
    if not codes.is_meta and ((codes & 127) == 127).any():
        raise ValueError("weight_scale must be E4M3 numbers, got NaN")
    return QuantizedWeight(
        swapped(packed), codes, None, None, E2M1.to(packed.device, copy=True),
        scale_table(whole, divides).to(packed.device), (N, K), dtype, BLOCK, "nvfp4", "e4m3_global",
    )  # fmt: skip


def scale_table(whole: Tensor, divides: bool) -> Tensor:
    """fp32 `[256]`: the scale that each E4M3 pattern stands for, the two NaN patterns as 0. On the CPU."""
    name = "weight_global_scale" if divides else "weight_scale_2"
    if whole.numel() != 1 or whole.is_meta or not (whole.float().isfinite() & (whole > 0)).all():
        raise ValueError(f"{name} must be one number above 0, got {whole.tolist() if whole.numel() < 9 else 'several'}")
    factors = whole.cpu().float().reshape(1).expand(256)
    return e4m3_numbers() / factors if divides else e4m3_numbers() * factors
