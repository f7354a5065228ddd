"""quantize: absmax[b] = max |w| over block b; code = rank of w * (1 / max(absmax, 2^-126)) among the levels' midpoints.
quantize_absmax: scale_offset = mean of absmax; scale_absmax = max |absmax - scale_offset| of 256 blocks; 8-bit codes.

Who       quantize: a program takes BLOCKS whole blocks, 4096 weights. quantize_absmax has three launches: one thread
          sums a superblock in fp64, one program takes the mean, and a program encodes a superblock.
Trick     a binary search finds the rank by 4 lookups in shared memory, against 15 compares and additions. Maxima are of
          the bits as integers, which are ordered as the numbers are, with inf and NaN above all of them. The format
          defines the mean by a sum in order, whose fp64 additions depend on one another. Where no partial sum of any
          order is rounded, all orders agree, and one addition a value proves it: the order is kept only where it
          matters, as in the CUDA kernel.
Bytes     reads 2 (bf16) and writes 0.5 + 4/block_size a weight: 2.56 B at block size 64, 10 us for 4096 x 4096 at an
          H200's 4.3 TB/s of copy. Its SMs can issue 17.6 instructions a weight in that time; this takes 39 (SASS of
          sm_90), the CUDA kernel's buckets 16: a weight is quantized once. Not measured.
Needs     code is a permutation of 16 ascending levels; scale_code ascends unless it is e4m3. Division must be IEEE's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantized_weight import INT8_LEVELS, SUPERBLOCK, absmax_shape, packed_shape
from ..arguments import check_quantize, check_quantize_absmax
from .decode import LAUNCH, ceil_div, on_device_of, with_int8

TILE = 4096  # weights a program: at least one whole block of any size
SUMS_TILE = 32  # superblocks a program that sums
MEAN_TILE = tl.constexpr(256)


@triton.jit
def sorted_levels(code, i):
    """(levels, their codes), sorted by value, then code; i is arange(16)."""
    level = tl.load(code + i)
    before = (level[None, :] < level[:, None]) | ((level[None, :] == level[:, None]) & (i[None, :] < i[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    here = rank[None, :] == i[:, None]  # [i, code]
    return tl.sum(tl.where(here, level[None, :], 0.0), 1), tl.sum(tl.where(here, i[None, :], 0), 1)


@triton.jit
def quantize_kernel(
    weight, code, packed, absmax, numel, block_size: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    SIZE: tl.constexpr = BLOCKS * block_size
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    index = first_block * block_size + tl.arange(0, SIZE)
    w = tl.load(weight + index, mask=index < numel, other=0.0).to(tl.float32)
    w = tl.reshape(w, [BLOCKS, block_size])
    largest = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = largest < 0x7F800000
    peak = largest.to(tl.float32, bitcast=True)
    block = first_block + tl.arange(0, BLOCKS)
    tl.store(absmax + block, tl.where(finite, peak, float("nan")), mask=block * block_size < numel)
    # Where a block is not finite, all its weights get the code of 0.
    inverse = tl.div_rn(1.0, tl.where(peak < 2.0**-126, 2.0**-126, peak))
    scaled = tl.reshape(tl.where(finite[:, None], w * inverse[:, None], 0.0), [SIZE])

    i = tl.arange(0, 16)
    levels, codes = sorted_levels(code, i)
    midpoints = (levels + tl.gather(levels, tl.minimum(i + 1, 15), 0)) * 0.5  # the last of the 16 is not used
    rank = tl.zeros([SIZE], tl.int32)
    for shift in tl.static_range(4):
        step = 8 >> shift
        rank += tl.where(scaled > tl.gather(midpoints, rank + (step - 1), 0), step, 0)
    even, odd = tl.split(tl.reshape(tl.gather(codes, rank, 0), [SIZE // 2, 2]))
    byte = first_block * (block_size // 2) + tl.arange(0, SIZE // 2)
    tl.store(packed + byte, (even << 4 | odd).to(tl.uint8), mask=byte * 2 < numel)


@triton.jit
def quantize_int8_kernel(weight, packed, scales, numel, block_size: tl.constexpr, BLOCKS: tl.constexpr):
    """scale[b] = max |w| / 127; byte = nearest even of w * (1 / max(max |w|, 2^-126)) * 127, 0 where not finite."""
    SIZE: tl.constexpr = BLOCKS * block_size
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    index = first_block * block_size + tl.arange(0, SIZE)
    w = tl.reshape(tl.load(weight + index, mask=index < numel, other=0.0).to(tl.float32), [BLOCKS, block_size])
    largest = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = largest < 0x7F800000
    peak = largest.to(tl.float32, bitcast=True)
    block = first_block + tl.arange(0, BLOCKS)
    scale = tl.div_rn(peak, 127.0)
    tl.store(scales + block, tl.where(finite, scale, float("nan")), mask=block * block_size < numel)
    inverse = tl.div_rn(1.0, tl.where(peak < 2.0**-126, 2.0**-126, peak))
    scaled = tl.where(finite[:, None], w * inverse[:, None], 0.0) * 127.0
    rounded = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2^23, about which the ulp is 1: nearest even
    tl.store(packed + index, tl.reshape(rounded.to(tl.int8), [SIZE]), mask=index < numel)


@triton.jit
def superblock_sums_kernel(absmax, sums, blocks, superblocks, TILE: tl.constexpr):
    superblock = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    for i in range(256):
        block = superblock * 256 + i
        total += tl.load(absmax + block, mask=block < blocks, other=0.0).to(tl.float64)
    tl.store(sums + superblock, total, mask=superblock < superblocks)


@triton.jit(do_not_specialize=["blocks"])
def mean_kernel(sums, mean, superblocks, blocks):
    """The mean, by one program. Let L = 4 * (sum of all |v|). If (v + L) - L == v for every v, then every v, and so
    every partial sum, is a multiple of 2^-53 of the binade of L: it fits in fp64's 53 bits and none is rounded."""
    i = tl.arange(0, MEAN_TILE)
    some = tl.zeros([MEAN_TILE], tl.float64)
    size = tl.zeros([MEAN_TILE], tl.float64)
    for first in range(0, superblocks, MEAN_TILE):
        value = tl.load(sums + first + i, mask=first + i < superblocks, other=0.0)
        some += value
        size += tl.abs(value)
    total = tl.sum(some, 0)
    large = 4 * tl.sum(size, 0)
    rounded = tl.zeros([MEAN_TILE], tl.int32)
    for first in range(0, superblocks, MEAN_TILE):
        value = tl.load(sums + first + i, mask=first + i < superblocks, other=0.0)
        rounded |= tl.where((value + large) - large == value, 0, 1)  # 1 also for NaN and inf
    if tl.max(rounded, 0) != 0:
        total = tl.load(sums)
        for s in range(1, superblocks):
            total += tl.load(sums + s)
    tl.store(mean, (total / blocks.to(tl.float64)).to(tl.float32))


@triton.jit
def e4m3_bits(value):
    """fp32 to FP8 E4M3's bits (bias 7, no inf, NaN at 0x7f), nearest even; in integers, for GPUs without FP8."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    shifted = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)  # ulp: 2^-9, as below 2^-6
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    pattern = tl.where(magnitude < 0x3C800000, shifted - 0x46800000, normal)
    return sign | tl.where(magnitude >= 0x43F00000, 0x7F, pattern)  # 480 and up, and NaN


@triton.jit
def scale_codes_kernel(absmax, mean, scale_code, quantized, scale_absmax, blocks, IS_E4M3: tl.constexpr):
    superblock = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, 256)
    block = superblock * 256 + i
    inside = block < blocks
    centred = tl.where(inside, tl.load(absmax + block, mask=inside, other=0.0) - tl.load(mean), 0.0)
    peak = tl.max(centred.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    tl.store(scale_absmax + superblock, peak)
    s = tl.where(peak < 2.0**-100, 2.0**-100, peak)
    if IS_E4M3:
        index = e4m3_bits(centred * tl.div_rn(448.0, s))
    else:
        value = centred * tl.div_rn(1.0, s)
        midpoints = (tl.load(scale_code + i) + tl.load(scale_code + tl.minimum(i + 1, 255))) * 0.5
        index = tl.zeros([256], tl.int32)
        for shift in tl.static_range(8):
            step = 128 >> shift
            index += tl.where(value > tl.gather(midpoints, index + (step - 1), 0), step, 0)
    tl.store(quantized + block, index.to(tl.uint8), mask=inside)


def quantize(weight: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    check_quantize(weight, code, block_size)
    N, K = weight.shape
    packed = weight.new_empty(packed_shape(N, K, code.numel()), dtype=torch.uint8)
    absmax = weight.new_empty(absmax_shape(N, K, block_size), dtype=torch.float32)
    if packed.numel() == 0:
        return packed, absmax
    grid = (ceil_div(N * K, TILE),)
    with on_device_of(weight):
        if code.numel() == INT8_LEVELS:
            quantize_int8_kernel[grid](
                weight.contiguous(), with_int8(packed, code), absmax, N * K, block_size, TILE // block_size,
                num_warps=4, **LAUNCH,
            )  # fmt: skip
            return packed, absmax
        quantize_kernel[grid](
            weight.contiguous(), code, packed, absmax, N * K, block_size, TILE // block_size, num_warps=4, **LAUNCH
        )
    return packed, absmax


def quantize_absmax(absmax: Tensor, scale_code: Tensor, scale_is_e4m3: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize_absmax(absmax, scale_code, scale_is_e4m3)
    blocks = absmax.numel()
    superblocks = ceil_div(blocks, SUPERBLOCK)
    quantized, scale_absmax = absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(superblocks)
    if blocks == 0:
        return quantized, scale_absmax, absmax.new_zeros(())
    scale_offset, sums = absmax.new_empty(()), absmax.new_empty(superblocks, dtype=torch.float64)
    with on_device_of(absmax):
        grid = (ceil_div(superblocks, SUMS_TILE),)
        superblock_sums_kernel[grid](absmax, sums, blocks, superblocks, TILE=SUMS_TILE, num_warps=1, **LAUNCH)
        mean_kernel[(1,)](sums, scale_offset, superblocks, blocks, num_warps=4, **LAUNCH)
        scale_codes_kernel[(superblocks,)](
            absmax, scale_offset, scale_code, quantized, scale_absmax, blocks, scale_is_e4m3, num_warps=4, **LAUNCH
        )
    return quantized, scale_absmax, scale_offset
