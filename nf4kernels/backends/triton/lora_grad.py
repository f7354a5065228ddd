"""lora_grad: out[r, C] = scaling * small[M, r]^T @ wide[M, C], or its transpose [C, r]; summed in fp32, rounded once.

Who       a program owns BLOCK_R x BLOCK_C of out and sums SPLIT of M, BLOCK_M a step; reduce.py adds the partial sums
          in order, scales and rounds.
Trick     split-K: the contraction is M, which is long, and out is small, so that without splits only C / 64 programs
          would run. Rejected: atomic additions into out, whose order differs from run to run.
Bytes     reads wide once for every 32 of the rank: M = 4096, C = 4096 bf16 34 MB, 8 us at an H200's 4.3 TB/s; partial
          sums add 8 r / SPLIT of it (r = 16: a quarter). Not measured.
Needs     nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_data, check_dtype, refuse
from .decode import LAUNCH, ceil_div, on_device_of
from .linear import matrix
from .reduce import reduce_splits

SPLIT = 512  # m of a program: the most terms of one fp32 sum
BLOCK_M, BLOCK_C = 32, 64


@triton.jit(do_not_specialize=["M"])
def lora_grad_kernel(
    small, wide, partial, M, rank, C, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial is [splits, rank, C]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    in_c, in_rank = (c < C)[None, :], (r < rank)[None, :]
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for step in range(0, SPLIT, BLOCK_M):
        m = split * SPLIT + step + tl.arange(0, BLOCK_M)
        in_m = (m < M)[:, None]
        s = tl.load(small + m[:, None] * rank + r[None, :], mask=in_m & in_rank, other=0.0)
        w = tl.load(wide + m[:, None] * C + c[None, :], mask=in_m & in_c, other=0.0)
        sums = tl.dot(tl.trans(s), w, sums, input_precision="ieee")
    at = (split * rank + r)[:, None] * C + c[None, :]
    tl.store(partial + at, sums, mask=(r < rank)[:, None] & in_c)


def lora_grad(small: Tensor, wide: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    if small.dim() == 0 or wide.dim() == 0:
        refuse("lora_grad", f"small and wide must have columns, got shapes {list(small.shape)} and {list(wide.shape)}")
    check_dtype("lora_grad", "wide", wide.dtype)
    check_dtype("lora_grad", "dtype", dtype)
    M, rank, C = wide.shape[:-1].numel(), small.shape[-1], wide.shape[-1]
    check_data("lora_grad", wide.device, "small", small, wide.dtype, M * rank)
    shape = (C, rank) if transposed else (rank, C)
    if M == 0 or rank == 0 or C == 0:
        return wide.new_zeros(shape, dtype=dtype)
    out = wide.new_empty(shape, dtype=dtype)
    splits, BLOCK_R = ceil_div(M, SPLIT), 16 if rank <= 16 else 32
    partial = wide.new_empty((splits, rank, C), dtype=torch.float32)
    grid = (ceil_div(C, BLOCK_C), ceil_div(rank, BLOCK_R), splits)
    with on_device_of(wide):
        lora_grad_kernel[grid](
            small, matrix(wide), partial, M, rank, C, SPLIT=SPLIT, BLOCK_M=BLOCK_M, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C,
            num_warps=4, num_stages=3, **LAUNCH,
        )  # fmt: skip
    reduce_splits(partial, out, scaling=scaling, transposed=transposed)
    return out
