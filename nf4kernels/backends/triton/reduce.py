"""out = scaling * (sum over the splits, in order, of partial[splits, M, columns]) + bias, rounded once.

Who       a program takes 1024 neighbours of out and adds their partial sums in order, so that the bits depend on
          nothing but the number of splits.
Trick     none. Rejected: atomic additions, whose order differs from run to run.
Bytes     4 splits + 2 an element: with the predicted tables at most an eighth of the weight's bytes.
Needs     nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from .decode import LAUNCH, ceil_div, on_device_of

SIZE = 1024


@triton.jit(do_not_specialize=["M", "splits"])
def reduce_kernel(
    partial, out, bias, scaling, M, columns, splits, transposed_stride, SIZE: tl.constexpr
):  # fmt: skip
    numel = M.to(tl.int64) * columns  # a multiple of 16 where columns is: the loads are vectors
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < numel
    total = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * numel + index, mask=inside, other=0.0)
    total *= scaling
    if bias is not None:
        total += tl.load(bias + index % columns, mask=inside, other=0.0).to(tl.float32)
    if transposed_stride is not None:
        index = index % columns * transposed_stride + index // columns
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


def reduce_splits(
    partial: Tensor, out: Tensor, bias: Tensor | None = None, scaling: float = 1.0, transposed: bool = False
) -> None:
    """partial[splits, M, columns] into out[M, columns], or its transpose [columns, M]."""
    splits, M, columns = partial.shape
    with on_device_of(out):
        reduce_kernel[(ceil_div(M * columns, SIZE),)](
            partial, out, bias, scaling, M, columns, splits, M if transposed else None, SIZE=SIZE,
            num_warps=4, **LAUNCH,
        )  # fmt: skip
