"""lora_grad: out[r, C] = scaling * small[M, r]^T @ wide[M, C], or its transpose [C, r]; summed in fp32, rounded once.

Who       a program sums SPLIT rows for RANK rows of out by COLUMNS columns; reduce.py adds the parts up in order,
          scales and rounds.
Trick     the contraction is the batch, long and across memory, and out is small: without splitting M only C / 64
          programs would run. Rejected: atomic additions into out, whose order is another in every run.
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

SPLIT = 512  # rows of a program: as many as an fp32 sum may have in one run
DEPTH, COLUMNS = 32, 64


@triton.jit(do_not_specialize=["depth"])
def lora_grad_kernel(
    small, wide, partial, depth, rank, columns, SPLIT: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [splits, rank, columns]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    split = tl.program_id(2).to(tl.int64)
    in_columns, in_rank = (column < columns)[None, :], (r < rank)[None, :]
    sums = tl.zeros([RANK, COLUMNS], tl.float32)
    for step in range(0, SPLIT, DEPTH):
        m = split * SPLIT + step + tl.arange(0, DEPTH)
        in_depth = (m < depth)[:, None]
        s = tl.load(small + m[:, None] * rank + r[None, :], mask=in_depth & in_rank, other=0.0)
        w = tl.load(wide + m[:, None] * columns + column[None, :], mask=in_depth & in_columns, other=0.0)
        sums = tl.dot(tl.trans(s), w, sums, input_precision="ieee")
    at = (split * rank + r)[:, None] * columns + column[None, :]
    tl.store(partial + at, sums, mask=(r < rank)[:, None] & in_columns)


def lora_grad(small: Tensor, wide: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    if small.dim() == 0 or wide.dim() == 0:
        refuse("lora_grad", f"small and wide must have columns, got shapes {list(small.shape)} and {list(wide.shape)}")
    check_dtype("lora_grad", "wide", wide.dtype)
    check_dtype("lora_grad", "dtype", dtype)
    rows, rank, columns = wide.shape[:-1].numel(), small.shape[-1], wide.shape[-1]
    check_data("lora_grad", wide.device, "small", small, wide.dtype, rows * rank)
    shape = (columns, rank) if transposed else (rank, columns)
    if rows == 0 or rank == 0 or columns == 0:
        return wide.new_zeros(shape, dtype=dtype)
    out = wide.new_empty(shape, dtype=dtype)
    splits, RANK = ceil_div(rows, SPLIT), 16 if rank <= 16 else 32
    partial = wide.new_empty((splits, rank, columns), dtype=torch.float32)
    grid = (ceil_div(columns, COLUMNS), ceil_div(rank, RANK), splits)
    with on_device_of(wide):
        lora_grad_kernel[grid](
            small, matrix(wide), partial, rows, rank, columns, SPLIT=SPLIT, DEPTH=DEPTH, RANK=RANK, COLUMNS=COLUMNS,
            num_warps=4, num_stages=3, **LAUNCH,
        )  # fmt: skip
    reduce_splits([partial], [out], scaling=scaling, turned=transposed)
    return out
