"""grouped_linear: y[T, N] = rows of x[T, K] @ their expert's W[N, K]^T, for E experts in one launch, from packed bytes.

Who       a program finds its (expert, tile of ROWS tokens), then sums all of K for COLUMNS rows of that expert's W, as
          linear's does. The experts' tiles come one after the other, then those of the rows of no expert, whose sum has
          no terms, then some that have nothing to do: the host, which does not know the offsets, starts the most.
Trick     each program finds its tile by itself, with two scans over the offsets and three sums: 78 instructions a
          thread for 8 experts, 142 for 127, 239 for 300 (SASS of sm_90); decoding its weights takes 20000 for K = 4096.
          Rejected: a kernel before, that writes the tiles down (a launch more); tiles that begin at multiples of ROWS,
          which need no second scan, but E more of them even for T = 1. Left out: panels for many rows; the only grouped
          product of torch's that does not make an NVIDIA host wait is for bf16 on sm_90 and sm_100.
Flops     2 T N K; reads each active expert's 0.516 B a weight for every ROWS of its tokens, but for the first time out
          of the L2. The loop is linear's. Not measured.
Needs     K a multiple of 64 and of the block size. A K longer than LONGEST_DEPTH is summed by runs within the program:
          partial sums of splits would take 4 T N bytes each, and experts are programs enough.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantized_weight import SUPERBLOCK
from ..arguments import check_experts
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
