"""MXFP4 (OCP Microscaling 1.0): E2M1 codes in blocks of 32, each with an E8M0 exponent for a scale.

gpt-oss has its experts as `*_blocks` uint8 `[E, N, K/32, 16]` and `*_scales` uint8 `[E, N, K/32]`, and
compressed-tensors a matrix as `weight_packed` uint8 `[N, K/2]` and `weight_scale` uint8 `[N, K/32]`. The even element
is in the low nibble of both.
"""

import torch
from torch import Tensor

from ...codebook import E2M1, SCALE_CODEBOOKS
from ...quantized_weight import QuantizedExperts, QuantizedWeight
from .nibbles import swapped

BLOCK = 32
NAN = 255


def experts_from_blocks(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> QuantizedExperts:
    """`[E, N, K]`, on blocks' device; ValueError for other shapes or a scale that is NaN."""
    if blocks.dtype != torch.uint8 or blocks.dim() != 4 or blocks.shape[3] != BLOCK // 2:
        raise ValueError(f"_blocks must be uint8 [E, N, K/32, 16], got {blocks.dtype} {list(blocks.shape)}")
    E, N, groups, _ = blocks.shape
    _check_scales(scales, blocks.shape[:3], "_scales")
    return QuantizedExperts(
        swapped(blocks).view(E, N, groups * BLOCK // 2), scales.contiguous(), None, None, _on(E2M1, blocks),
        _on(SCALE_CODEBOOKS["e8m0"], blocks).repeat(E, 1), (E, N, groups * BLOCK), dtype, BLOCK, "mxfp4", "e8m0",
    )  # fmt: skip


def blocks_from_experts(qweights: QuantizedExperts) -> tuple[Tensor, Tensor]:
    """(blocks, scales) that `experts_from_blocks` reads: of what it has read the same bytes.

    ValueError for experts in another format.
    """
    if qweights.codebook != "mxfp4":
        raise ValueError(f"experts must be in mxfp4 to be written so, got {qweights.codebook}")
    return swapped(qweights.packed).view(*qweights.absmax.shape, BLOCK // 2), qweights.absmax


def weight_from_packed(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """`[N, K]` of compressed-tensors' two tensors; ValueError for other shapes or a scale that is NaN."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] % (BLOCK // 2):
        raise ValueError(f"weight_packed must be uint8 [N, K/2], got {packed.dtype} {list(packed.shape)}")
    N, K = packed.shape[0], packed.shape[1] * 2
    _check_scales(scales, (N, K // BLOCK), "weight_scale")
    return QuantizedWeight(
        swapped(packed), scales.contiguous(), None, None, _on(E2M1, packed), _on(SCALE_CODEBOOKS["e8m0"], packed),
        (N, K), dtype, BLOCK, "mxfp4", "e8m0",
    )  # fmt: skip


def packed_from_weight(qweight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """(weight_packed, weight_scale) that `weight_from_packed` reads: of what it has read the same bytes."""
    return swapped(qweight.packed), qweight.absmax


def _check_scales(scales: Tensor, shape: tuple[int, ...], name: str) -> None:
    if scales.dtype != torch.uint8 or tuple(scales.shape) != tuple(shape):
        raise ValueError(f"{name} must be uint8 {list(shape)}, got {scales.dtype} {list(scales.shape)}")
    if not scales.is_meta and (scales == NAN).any():
        raise ValueError(f"{name} must be E8M0 numbers, got NaN (255)")


def _on(levels: Tensor, like: Tensor) -> Tensor:
    return levels.to(like.device, copy=True)
