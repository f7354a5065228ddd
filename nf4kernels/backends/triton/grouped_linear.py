"""grouped_linear: y[T, N] = rows of x[T, K] @ their expert's W[N, K]^T, for E experts in one launch, from packed bytes.

Who       a program finds its (expert, tile of ROWS tokens), then sums all of K for COLUMNS rows of that expert's W, as
          linear does. The experts' tiles come one after the other, then those of the rows of no expert, whose sum has
          no terms, then up to min(E, T) programs by column tile that have nothing to do.
Trick     each program finds its tile by itself: two scans over the offsets and three sums, 25 instructions a lane of
          experts. Rejected: a kernel before, that writes the tiles down (a launch more); tiles at multiples of ROWS,
          which need no second scan, but E idle ones even for T = 1. Left out: panels for many rows, for torch's
          grouped_mm has no kernel before sm_90 nor for fp16 and makes the host wait for the offsets there.
Flops     2 T N K; reads each active expert's 0.516 B a weight once for every ROWS of its tokens, the first time from
          memory. Instructions a weight as for linear; the offsets' 4 E bytes a program come from the L2. Not measured.
Needs     K a multiple of 64 and of the block size. Partial sums of splits would be [splits, T, N] with as many programs
          again: experts are enough of them, so a long K has runs within the program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantized_weight import SUPERBLOCK
from .arguments import check_experts
from .choose import LONGEST_DEPTH, LONGEST_FP32, choose_for_experts
from .decode import LAUNCH, ceil_div, on_device_of
from .linear import add_runs


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def find_group(offsets, tile, T, E, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; expert E is none, and past all tiles the end is 0."""
    i = tl.arange(0, EXPERTS)
    before = tl.load(offsets + i - 1, mask=(i > 0) & (i <= E), other=tl.where(i > E, T, 0))
    begin = tl.associative_scan(tl.minimum(before, T), 0, larger)
    end = tl.maximum(begin, tl.minimum(tl.load(offsets + i, mask=i < E, other=T), T))
    tiles = (end - begin + (ROWS - 1)) // ROWS
    tile -= tl.cumsum(tiles, 0) - tiles
    here = (tile >= 0) & (tile < tiles)
    expert = tl.sum(tl.where(here, i, 0), 0)
    return expert, tl.sum(tl.where(here, begin + tile * ROWS, 0), 0), tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def weight_of(packed, absmax, scale_absmax, scale_offset, expert, N, K, block_shift, superblocks):
    """Where the expert's part of each tensor begins."""
    expert = expert.to(tl.int64)
    packed += expert * N * (K >> 1)
    absmax += expert * N * (K >> block_shift)
    if scale_absmax is not None:
        scale_absmax += expert * superblocks
        scale_offset += expert
    return packed, absmax, scale_absmax, scale_offset


@triton.jit(do_not_specialize=["T"])
def grouped_linear_kernel(
    x, offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, out, T, E, N, K, block_shift, superblocks,
    tiles, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    expert, row, end = find_group(offsets, tl.program_id(0) // tiles, T, E, EXPERTS, ROWS)
    if row >= end:
        return
    packed, absmax, scale_absmax, scale_offset = weight_of(
        packed, absmax, scale_absmax, scale_offset, expert, N, K, block_shift, superblocks
    )
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    token = row + tl.arange(0, ROWS)
    in_columns, in_tokens = column < N, token < end
    column, token = column.to(tl.int64), token.to(tl.int64)
    acc = add_runs(
        tl.zeros([COLUMNS, ROWS], tl.float32), x, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code,
        scale_code, column, in_columns, K, block_shift, 0, tl.where(expert < E, K, 0), COLUMNS, ROWS, BLOCK, True, RUN,
    )  # fmt: skip
    at = token[None, :] * N + column[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_columns[:, None] & in_tokens[None, :])


def run_of(depth: int, dtype: torch.dtype) -> int:
    """Terms of a program's runs; 0: one run."""
    if dtype == torch.float32:
        return LONGEST_FP32
    return LONGEST_DEPTH if depth > LONGEST_DEPTH else 0


def most_tiles(T: int, E: int, rows: int) -> int:
    """Of `rows` rows: each expert that has some, and the rows of none, may end in a tile that is not full."""
    return (T + min(E + 1, T) * (rows - 1)) // rows


def superblocks_of(N: int, K: int, block_size: int) -> int:
    return ceil_div(N * K // block_size, SUPERBLOCK)


def grouped_linear(
    x: Tensor, expert_offsets: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None,
    scale_offset: Tensor | None, code: Tensor, scale_code: Tensor | None, N: int, K: int, block_size: int,
) -> Tensor:  # fmt: skip
    tensors = (packed, absmax, scale_absmax, scale_offset, code, scale_code)
    check_experts("grouped_linear", "x", x, expert_offsets, (*tensors, N, K, block_size), "K", K)
    T, E = x.shape[0], expert_offsets.shape[0]
    out = x.new_empty((T, N))
    if out.numel() == 0:
        return out
    choice = choose_for_experts("grouped_linear", T, E, K, block_size, K, x.dtype, x.device)
    config, tiles = choice.config, ceil_div(N, choice.config.columns)
    with on_device_of(x):
        grouped_linear_kernel[(tiles * most_tiles(T, E, config.rows),)](
            x.contiguous(), expert_offsets, *tensors, out, T, E, N, K, block_size.bit_length() - 1,
            superblocks_of(N, K, block_size), tiles, EXPERTS=triton.next_power_of_2(E + 1), COLUMNS=config.columns,
            ROWS=config.rows, BLOCK=choice.block, RUN=run_of(K, x.dtype), **config.launch, **LAUNCH,
        )  # fmt: skip
    return out
