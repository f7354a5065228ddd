"""grouped_lora_inner: P[T, r] = rows of x[T, D] @ their expert's factor, A[e][r, D]^T or, transposed, B[e][D, r], for E
experts in one launch.

Who       a program finds its expert and its BLOCK_M rows as grouped_linear's does, then sums all of D for BLOCK_R of
          the rank.
Trick     grouped_linear's search for the tile. One kernel reads both layouts of the factor by its strides, of which
          Triton compiles the 1 in, so that either is loaded along its contiguous dimension. Rejected: splits of D,
          whose partial sums an expert of few rows would need most, and a launch more.
Bytes     reads x once for every 32 of the rank and the factor once for every BLOCK_M rows, from the L2 but for the
          first time: T = 4096, D = 4096 bf16 34 MB, 8 us at an H200's 4.3 TB/s. Not measured.
Needs     nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_grouped_lora_inner
from .choose import LONGEST_DEPTH, LONGEST_FP32
from .decode import LAUNCH, ceil_div, on_device_of
from .grouped_linear import find_group, most_tiles
from .linear import rank_step

BLOCK_M = 32
BLOCK_D = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # of twice as much it spills on sm_80 and sm_90


@triton.jit(do_not_specialize=["T"])
def grouped_lora_inner_kernel(
    x, offsets, factor, out, T, E, D, rank, r_stride, d_stride, tiles_r, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """factor[e][r, d] is r * r_stride + d * d_stride elements past its expert's first."""
    expert, m_begin, m_end = find_group(offsets, tl.program_id(0) // tiles_r, T, E, EXPERTS, BLOCK_M)
    if m_begin >= m_end:
        return
    m = m_begin + tl.arange(0, BLOCK_M)
    r = tl.program_id(0) % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    in_m, in_rank = (m < m_end)[:, None], r < rank
    m = m.to(tl.int64)[:, None]
    factor += expert.to(tl.int64) * rank * D + r[None, :] * r_stride
    sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    depth = tl.where(expert < E, D, 0)
    for run in range(0, depth, RUN):
        part = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for step in range(run, tl.minimum(run + RUN, depth), BLOCK_D):
            d = step + tl.arange(0, BLOCK_D)
            in_d = d < depth
            rows = tl.load(x + m * D + d[None, :], mask=in_m & in_d[None, :], other=0.0)
            columns = tl.load(factor + d[:, None] * d_stride, mask=in_d[:, None] & in_rank[None, :], other=0.0)
            part = tl.dot(rows, columns, part, input_precision="ieee")
        sums += part
    tl.store(out + m * rank + r[None, :], sums.to(out.dtype.element_ty), mask=in_m & in_rank[None, :])


def grouped_lora_inner(x: Tensor, expert_offsets: Tensor, lora_factor: Tensor, transposed: bool = False) -> Tensor:
    check_grouped_lora_inner(x, expert_offsets, lora_factor, transposed)
    (T, D), E, rank = x.shape, expert_offsets.shape[0], lora_factor.shape[2 if transposed else 1]
    out = x.new_empty((T, rank))
    if out.numel() == 0:
        return out
    strides = (1, rank) if transposed else (D, 1)
    BLOCK_R = rank_step(rank)
    tiles_r = ceil_div(rank, BLOCK_R)
    with on_device_of(x):
        grouped_lora_inner_kernel[(tiles_r * most_tiles(T, E, BLOCK_M),)](
            x.contiguous(), expert_offsets, lora_factor, out, T, E, D, rank, *strides, tiles_r,
            EXPERTS=triton.next_power_of_2(E + 1), BLOCK_M=BLOCK_M, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D[x.dtype],
            RUN=LONGEST_FP32 if x.dtype == torch.float32 else LONGEST_DEPTH, num_warps=4, num_stages=3, **LAUNCH,
        )  # fmt: skip
    return out
