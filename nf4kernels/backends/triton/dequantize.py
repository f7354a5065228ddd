"""dequantize: out[row, col] = code[nibble] * scale(block), rounded once to fp32, then once to the output dtype, for a
range of rows and columns of a weight [N, K].

Who       a program decodes TILE chunks of 32 consecutive weights, or of a block of 16. Chunks begin at multiples of
          their size in the flattened weight, so that a chunk has one scale and whole bytes for every K, range and block
          size.
Trick     whole rows into a contiguous out are one run of the flattened weight, so that one kernel is the fast path of
          every K, odd ones included; a range of columns is one run a row. Rejected: a program for a tile of rows and
          columns, which decodes a scale for each byte where blocks straddle rows.
Bytes     reads 0.5 and the scales, writes 2 (bf16) a weight: 2.52 at block size 64, 9.8 us for 4096 x 4096 at an
          H200's 4.3 TB/s of copy. Its SMs can issue 17.3 instructions a weight in that time; this takes 14 (SASS of
          sm_90). Not measured.
Needs     rows of out that do not overlap.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_dequantize, check_dequantize_out
from .decode import LAUNCH, block_scales, ceil_div, lookup, on_device_of, with_int8

CHUNK = 32  # at most: a block of 16 is one of its own
MOST_WEIGHTS = 4096  # a program
WARP_WEIGHTS = 1024  # a warp: 32 weights a thread take 14 instructions a weight, 8 weights a thread 23


@triton.jit
def dequantize_kernel(
    packed, absmax, scale_absmax, scale_offset, code, scale_code, out, first, pitch, stride, length, block_shift, tiles,
    numel, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Decodes `length` weights of each row. The first row begins at flat index `first`; rows are `pitch` apart in the
    weight and `stride` apart in out."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    begin = first + row * pitch
    chunk = begin // CHUNK + (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    start = chunk * CHUNK
    in_weight = start < numel
    scale = block_scales(absmax, scale_absmax, scale_offset, scale_code, start >> block_shift, in_weight)

    byte = (start >> 1)[:, None] + tl.arange(0, CHUNK // 2)[None, :]
    codes = tl.load(packed + byte, mask=byte * 2 < numel, other=0).to(tl.int32)
    table = tl.load(code + tl.arange(0, 16))
    even = lookup(table, codes >> 4, TILE, CHUNK // 2) * scale[:, None]
    odd = lookup(table, codes & 15, TILE, CHUNK // 2) * scale[:, None]
    values = tl.reshape(tl.join(even, odd), [TILE, CHUNK])
    column = (start - begin)[:, None] + tl.arange(0, CHUNK)[None, :]
    values = values.to(out.dtype.element_ty)
    tl.store(out + row * stride + column, values, mask=(column >= 0) & (column < length))


@triton.jit
def dequantize_int8_kernel(
    packed, absmax, scale_absmax, scale_offset, scale_code, out, first, pitch, stride, length, block_shift, tiles,
    numel, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dequantize_kernel of int8: the integer itself times the chunk's scale."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    begin = first + row * pitch
    chunk = begin // CHUNK + (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    start = chunk * CHUNK
    scale = block_scales(absmax, scale_absmax, scale_offset, scale_code, start >> block_shift, start < numel)
    at = start[:, None] + tl.arange(0, CHUNK)[None, :]
    values = tl.load(packed + at, mask=at < numel, other=0).to(tl.float32) * scale[:, None]
    column = at - begin
    tl.store(
        out + row * stride + column, values.to(out.dtype.element_ty), mask=(column >= 0) & (column < length)
    )  # fmt: skip


def tile_of(length: int, chunk: int) -> int:
    """Chunks of a program: a run's, plus one because the run can begin inside a chunk, up to MOST_WEIGHTS."""
    return min(triton.next_power_of_2(ceil_div(length, chunk) + 1), MOST_WEIGHTS // chunk)


def dequantize(
    packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, row_begin: int, row_end: int, col_begin: int,
    col_end: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    check_dequantize(*weight, row_begin, row_end, col_begin, col_end, dtype)
    out = packed.new_empty((row_end - row_begin, col_end - col_begin), dtype=dtype)
    launch(weight, row_begin, col_begin, out)
    return out


def dequantize_out(
    packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, row_begin: int, row_end: int, col_begin: int,
    col_end: int, out: Tensor,
) -> None:  # fmt: skip
    weight = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    check_dequantize_out(*weight, row_begin, row_end, col_begin, col_end, out)
    launch(weight, row_begin, col_begin, out)


def launch(weight: tuple, row_begin: int, col_begin: int, out: Tensor) -> None:
    """Decodes Ŵ[row_begin.., col_begin..] into out, which has the range's shape."""
    *tensors, N, K, block_size = weight
    tensors[0] = with_int8(tensors[0], tensors[4])
    is_int8 = tensors[0].dtype == torch.int8
    rows, length = out.shape
    stride = out.stride(0)
    if rows == 0 or length == 0:
        return
    if rows == 1 or (length == K and stride == K):
        rows, length = 1, rows * length
    chunk = min(CHUNK, block_size)
    tile = tile_of(length, chunk)
    # A run that begins inside a chunk reaches into one chunk more.
    tiles = ceil_div(ceil_div(length, chunk) + 1, tile)
    first = row_begin * K + col_begin
    with on_device_of(out):
        kernel, tensors = (
            (dequantize_int8_kernel, [*tensors[:4], tensors[5]]) if is_int8 else (dequantize_kernel, tensors)
        )
        kernel[(rows * tiles,)](
            *tensors, out, first, K, stride, length, block_size.bit_length() - 1, tiles, N * K, TILE=tile,
            CHUNK=chunk, num_warps=max(tile * chunk // WARP_WEIGHTS, 1), **LAUNCH,
        )  # fmt: skip
