"""Codes and scales of a QuantizedWeight, chosen anew: what any rounding writes, as the kernels decode it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...quantized_weight import SUPERBLOCK, QuantizedWeight

SMALLEST = 2.0**-126  # what a scale counts as at least where it divides


def nearest_codes(weight: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """The number of midpoints of `code` strictly below w * (1 / scale), as uint8; a tie takes the lower code.

    The rule of `nf4kernels.quantize`, for given scales: with each block's absmax it gives the same codes.

    Args:
        weight: fp32, any shape.
        scales: fp32, of a shape that broadcasts to weight's. A negative scale (a decoded one of a block near zero)
            is divided by as it is.
        code: fp32 `[16]`, in any order.
    """
    levels, order = code.sort(stable=True)
    return order.to(torch.uint8)[torch.bucketize(weight * inverted(scales), midpoints_of(levels), out_int32=True)]


def midpoints_of(levels: Tensor) -> Tensor:
    """fp32 `[15]` of ascending levels."""
    return (levels[:-1] + levels[1:]) / 2


def inverted(scales: Tensor) -> Tensor:
    """1 / scales, those nearer to 0 than SMALLEST read as that."""
    return 1 / torch.where(scales < 0, scales.clamp(max=-SMALLEST), scales.clamp(min=SMALLEST))


def decoded_scales(qweight: QuantizedWeight) -> Tensor:
    """fp32 `[blocks]`, each block's scale as the kernels decode it."""
    return Lattice.of(qweight).decoded(qweight.absmax.reshape(-1))


def scale_of_each(scales: Tensor, shape: tuple[int, ...], block_size: int) -> Tensor:
    """`[N, K]`, which `shape` is: the scale of each weight, of `[blocks]`."""
    N, K = shape
    return scales.repeat_interleave(block_size)[: N * K].view(N, K)


def codes_of(qweight: QuantizedWeight) -> Tensor:
    """uint8 `[N, K]`, the codes that are packed."""
    N, K = qweight.shape
    flat = qweight.packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).view(-1)[: N * K].view(N, K)


def with_codes(qweight: QuantizedWeight, codes: Tensor, scales: Tensor | None = None) -> QuantizedWeight:
    """`qweight` with other codes, uint8 `[N, K]`, and other stored scales, of absmax' dtype, where they are given."""
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        of_zero = nearest_codes(flat.new_zeros(1, dtype=torch.float32), flat.new_ones(1).float(), qweight.code)
        flat = torch.cat([flat, of_zero])
    packed = (flat[0::2] << 4 | flat[1::2]).view(qweight.packed.shape)
    absmax = qweight.absmax if scales is None else scales.reshape(qweight.absmax.shape).contiguous()
    return replace(qweight, packed=packed, absmax=absmax)


@dataclass(frozen=True)
class Lattice:
    """The scales that a weight can store, its superblocks' numbers being as they are.

    Attributes:
        dtype: of absmax.
        numbers: fp32, ascending: what 8-bit codes stand for, those alone that may be produced; None where absmax holds
            numbers.
        codes: uint8, the code of each of `numbers`.
        table: fp32 `[256]`, what each code stands for.
        scale_absmax: fp32 `[blocks]`, each block's own; None without double quantization.
        scale_offset: fp32 scalar or None.
    """

    dtype: torch.dtype
    numbers: Tensor | None = None
    codes: Tensor | None = None
    table: Tensor | None = None
    scale_absmax: Tensor | None = None
    scale_offset: Tensor | None = None

    @classmethod
    def of(cls, qweight: QuantizedWeight) -> "Lattice":
        table = qweight.scale_code
        if table is None:
            return cls(qweight.absmax.dtype)
        allowed = table.isfinite()
        if qweight.scale_codebook == "e4m3":
            allowed[[0x7F, 0xFF]] = False  # NaN's patterns, which read as 0
        codes = allowed.nonzero()[:, 0]
        numbers, order = table[codes].sort(stable=True)
        own = qweight.scale_absmax
        blocks = qweight.absmax.numel()
        each = None if own is None else own.repeat_interleave(SUPERBLOCK)[:blocks]
        return cls(torch.uint8, numbers, codes[order].to(torch.uint8), table, each, qweight.scale_offset)

    def part(self, blocks: slice) -> "Lattice":
        """The same of some of the blocks."""
        return self if self.scale_absmax is None else replace(self, scale_absmax=self.scale_absmax[blocks])

    def nearest(self, scales: Tensor) -> Tensor:
        """What is stored for the decodable scale nearest to each of `[blocks]`, in absmax' dtype."""
        if self.numbers is None or self.codes is None:
            return scales.to(self.dtype)
        if self.scale_absmax is not None and self.scale_offset is not None:
            scales = (scales - self.scale_offset) / self.scale_absmax.clamp(min=2.0**-100)
        midpoints = (self.numbers[:-1] + self.numbers[1:]) / 2
        return self.codes[torch.bucketize(scales, midpoints, out_int32=True)]

    def decoded(self, stored: Tensor) -> Tensor:
        """fp32 `[blocks]`, with the kernels' operations in their order."""
        if self.table is None:
            return stored.float()
        scales = self.table[stored.long()]
        if self.scale_absmax is not None and self.scale_offset is not None:
            scales = scales * self.scale_absmax + self.scale_offset
        return scales
