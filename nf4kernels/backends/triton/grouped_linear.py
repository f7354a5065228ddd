"""grouped_linear: y[T, N] = rows of x[T, K] @ their expert's W[N, K]^T + scaling * rows of P[T, r] @ B[e][N, r]^T
+ bias[e], for E experts in one launch, from packed bytes.

Who       a program finds its expert and its tile of BLOCK_M rows, then sums all of K for BLOCK_N rows of W, as
          linear's does. The grid has the most tiles that can exist, as the host does not know the offsets: first every
          expert's in order, then those of the rows of no expert, which get zeros, then tiles without work. LoRA's term
          and the bias are linear's, read at the expert's place in the stacked factors.
Trick     each program finds its tile by itself, with two scans over the offsets and three sums: 78 instructions a
          thread for 8 experts, 142 for 127, 239 for 300 (SASS of sm_90); decoding its weights takes 20000 for K = 4096.
          Rejected: a kernel that writes the tiles down first (one launch more); tiles that begin at multiples of
          BLOCK_M, which need no second scan but are E more even for T = 1. Left out: dequantize + GEMM for many rows,
          as torch's grouped product makes an NVIDIA host wait except for bf16 on sm_90 and sm_100.
Flops     2 T N K; reads each active expert's 0.516 B a weight for every BLOCK_M of its rows, all but the first time
          from the L2. The loop is linear's. Not measured.
Needs     K a multiple of 64 and of the block size. A K longer than LONGEST_DEPTH is summed in runs within the program:
          the partial sums of splits would take 4 T N bytes each, and experts give programs enough.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantized_weight import SUPERBLOCK
from ..arguments import check_grouped_linear
from .choose import LONGEST_DEPTH, LONGEST_FP32, choose_for_experts
from .decode import LAUNCH, ceil_div, on_device_of, whole_words, with_int8
from .linear import add_lora_term, add_runs, rank_step


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def find_group(offsets, tile, T, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; expert E is none, and past all tiles the end is 0."""
    i = tl.arange(0, EXPERTS)
    before = tl.load(offsets + i - 1, mask=(i > 0) & (i <= E), other=tl.where(i > E, T, 0))
    begin = tl.associative_scan(tl.minimum(before, T), 0, larger)
    end = tl.maximum(begin, tl.minimum(tl.load(offsets + i, mask=i < E, other=T), T))
    tiles = (end - begin + (BLOCK_M - 1)) // BLOCK_M
    tile -= tl.cumsum(tiles, 0) - tiles
    here = (tile >= 0) & (tile < tiles)
    expert = tl.sum(tl.where(here, i, 0), 0)
    return expert, tl.sum(tl.where(here, begin + tile * BLOCK_M, 0), 0), tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def weight_of(packed, absmax, scale_absmax, scale_offset, scale_code, expert, N, K, block_shift, superblocks):
    """The pointers to the expert's part of each tensor; scale_code is each expert's own where it alone scales."""
    expert = expert.to(tl.int64)
    packed += expert * N * (K if packed.dtype.element_ty == tl.int8 else K >> 1)
    absmax += expert * N * (K >> block_shift)
    if scale_absmax is not None:
        scale_absmax += expert * superblocks
        scale_offset += expert
    elif scale_code is not None:
        scale_code += expert * 256
    return packed, absmax, scale_absmax, scale_offset, scale_code


@triton.jit(do_not_specialize=["T"])
def grouped_linear_kernel(
    x, offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, out, bias, lora_inner, lora_factor,
    scaling, T, E, N, K, rank, block_shift, superblocks, tiles_n, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALES: tl.constexpr, BLOCK_R: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    expert, m_begin, m_end = find_group(offsets, tl.program_id(0) // tiles_n, T, E, EXPERTS, BLOCK_M)
    if m_begin >= m_end:
        return
    packed, absmax, scale_absmax, scale_offset, scale_code = weight_of(
        packed, absmax, scale_absmax, scale_offset, scale_code, expert, N, K, block_shift, superblocks
    )
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_begin + tl.arange(0, BLOCK_M)
    in_n, in_m = n < N, m < m_end
    n, m = n.to(tl.int64), m.to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if BLOCK_R > 0:
        lora_factor += expert.to(tl.int64) * N * rank
        rank_here = tl.where(expert < E, rank, 0)
        acc = add_lora_term(acc, scaling, lora_factor, lora_inner, rank_here, n, in_n, m, in_m, BLOCK_R)
    acc = add_runs(
        acc, x, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, n, in_n, K, block_shift, 0,
        tl.where(expert < E, K, 0), BLOCK_M, BLOCK_N, BLOCK_K, SCALES, RUN,
    )  # fmt: skip
    if bias is not None:
        columns = tl.where(expert < E, N, 0)
        acc += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
    at = m[None, :] * N + n[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


def run_of(depth: int, dtype: torch.dtype) -> int:
    """The terms of each of a program's sums, RUN; 0: it has one sum."""
    if dtype == torch.float32:
        return LONGEST_FP32
    return LONGEST_DEPTH if depth > LONGEST_DEPTH else 0


def most_tiles(T: int, E: int, block_m: int) -> int:
    """The most tiles that can exist: each expert with rows, and the rows of none, may end in a partial tile."""
    return (T + min(E + 1, T) * (block_m - 1)) // block_m


def superblocks_of(N: int, K: int, block_size: int) -> int:
    return ceil_div(N * K // block_size, SUPERBLOCK)


def grouped_linear(
    x: Tensor, expert_offsets: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None,
    scale_offset: Tensor | None, code: Tensor, scale_code: Tensor | None, N: int, K: int, block_size: int,
    bias: Tensor | None = None, lora_P: Tensor | None = None, lora_B: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    tensors = (absmax, scale_absmax, scale_offset, code, scale_code)
    check_grouped_linear(x, expert_offsets, packed, *tensors, N, K, block_size, bias, lora_P, lora_B, scaling)
    T, E = x.shape[0], expert_offsets.shape[0]
    out = x.new_empty((T, N))
    if out.numel() == 0:
        return out
    choice = choose_for_experts("grouped_linear", T, E, K, block_size, K, x.dtype, x.device)
    config, tiles_n = choice.config, ceil_div(N, choice.config.BLOCK_N)
    packed = whole_words(with_int8(packed, code))
    rank = 0 if lora_B is None else lora_B.shape[2]
    with on_device_of(x):
        grouped_linear_kernel[(tiles_n * most_tiles(T, E, config.BLOCK_M),)](
            x.contiguous(), expert_offsets, packed, *tensors, out, bias, lora_P, lora_B, scaling, T, E, N, K, rank,
            block_size.bit_length() - 1, superblocks_of(N, K, block_size), tiles_n,
            EXPERTS=triton.next_power_of_2(E + 1), BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
            BLOCK_K=choice.BLOCK_K, SCALES=choice.scales, BLOCK_R=rank_step(rank), RUN=run_of(K, x.dtype),
            **config.launch, **LAUNCH,
        )  # fmt: skip
    return out
