"""grouped_lora_grad: out[e][r, C] = scaling * small[rows of e]^T @ wide[rows of e], or its transpose [C, r], for E
experts in one launch; summed in fp32, rounded once.

Who       a program owns BLOCK_R x BLOCK_C of one expert's out and sums all of its rows, BLOCK_M a step, in runs. One
          whose expert has no rows writes zeros.
Trick     the rows are the contraction, and the host does not know how many an expert has: a program reads its bounds
          from the offsets. Rejected: lora_grad's splits, as E experts have E C / 64 programs; where nearly all rows are
          one expert's, C / 64 programs run long.
Bytes     reads wide once for every 32 of the rank: T = 4096, C = 4096 bf16 34 MB, 8 us at an H200's 4.3 TB/s; writes
          E r C. Not measured.
Needs     nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_grouped_lora_grad
from .choose import LONGEST_DEPTH, LONGEST_FP32
from .decode import LAUNCH, ceil_div, on_device_of
from .linear import rank_step

BLOCK_M, BLOCK_C = 32, 64


@triton.jit
def rows_of(offsets, expert, T, EXPERTS: tl.constexpr):
    """(first row, end) of an expert's rows, whatever the offsets are, as find_group in grouped_linear.py has them."""
    i = tl.arange(0, EXPERTS)
    before = tl.minimum(tl.load(offsets + i, mask=i < expert, other=0), T)
    begin = tl.maximum(tl.max(before, 0), 0)
    return begin, tl.maximum(begin, tl.minimum(tl.load(offsets + expert), T))


@triton.jit(do_not_specialize=["T"])
def grouped_lora_grad_kernel(
    small, wide, offsets, out, scaling, T, rank, C, r_stride, c_stride, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out[e][r, c] is r * r_stride + c * c_stride elements past its expert's first."""
    expert = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_c, in_rank = (c < C)[None, :], r < rank
    begin, end = rows_of(offsets, expert, T, EXPERTS)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for run in range(begin, end, RUN):
        run_end = tl.minimum(run + RUN, end)
        part = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for step in range(run, run_end, BLOCK_M):
            m = step + tl.arange(0, BLOCK_M)
            in_m = (m < run_end)[:, None]
            m = m.to(tl.int64)[:, None]
            s = tl.load(small + m * rank + r[None, :], mask=in_m & in_rank[None, :], other=0.0)
            w = tl.load(wide + m * C + c[None, :], mask=in_m & in_c, other=0.0)
            part = tl.dot(tl.trans(s), w, part, input_precision="ieee")
        sums += part
    at = expert.to(tl.int64) * rank * C + r[:, None].to(tl.int64) * r_stride + c[None, :].to(tl.int64) * c_stride
    tl.store(out + at, (sums * scaling).to(out.dtype.element_ty), mask=in_rank[:, None] & in_c)


def grouped_lora_grad(
    small: Tensor, wide: Tensor, expert_offsets: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False
) -> Tensor:
    check_grouped_lora_grad(small, wide, expert_offsets, scaling, dtype, transposed)
    E, (T, C), rank = expert_offsets.shape[0], wide.shape, small.shape[1]
    out = wide.new_empty((E, C, rank) if transposed else (E, rank, C), dtype=dtype)
    if out.numel() == 0:
        return out
    strides = (1, rank) if transposed else (C, 1)
    BLOCK_R = rank_step(rank)
    with on_device_of(wide):
        grouped_lora_grad_kernel[(E, ceil_div(C, BLOCK_C), ceil_div(rank, BLOCK_R))](
            small, wide.contiguous(), expert_offsets, out, scaling, T, rank, C, *strides,
            EXPERTS=triton.next_power_of_2(E), BLOCK_M=BLOCK_M, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C,
            RUN=LONGEST_FP32 if wide.dtype == torch.float32 else LONGEST_DEPTH, num_warps=4, num_stages=3, **LAUNCH,
        )  # fmt: skip
    return out
