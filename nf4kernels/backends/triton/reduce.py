"""out = the sum over the splits of partial [splits, M, columns], in order, times scaling, plus bias, rounded once.

Who       a program takes 1024 neighbours of out and adds their partial sums up in turn, so that the bits depend on
          nothing but the number of splits.
Trick     the outs of a product with several weights are reduced by one launch. Rejected: atomic additions, whose order
          is another in every run.
Bytes     4 splits + 2 an element: with the predicted tables at most an eighth of the weight's bytes.
Needs     as many splits and rows for each out.
"""

import triton
import triton.language as tl
from torch import Tensor

from .decode import LAUNCH, ceil_div, on_device_of

SIZE = 1024


@triton.jit
def pick(values, count: tl.constexpr, tile, first):
    """(values[i], first[i]) of the i for which first[i] <= tile < first[i + 1]."""
    value = values[0]
    for i in tl.static_range(1, count):
        value = tl.where(tile >= first[i], values[i], value)
    return value


@triton.jit(do_not_specialize=["M", "first", "splits"])
def reduce_kernel(
    partial, out, columns, first, bias, scaling, M, splits, turned_stride, COUNT: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    source, to = pick(partial, COUNT, program, first), pick(out, COUNT, program, first)
    width = pick(columns, COUNT, program, first)
    numel = M.to(tl.int64) * width
    index = (program - pick(first, COUNT, program, first)).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < numel
    total = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        total += tl.load(source + split * numel + index, mask=inside, other=0.0)
    total *= scaling
    if bias is not None:
        total += tl.load(bias + index % width, mask=inside, other=0.0).to(tl.float32)
    if turned_stride is not None:
        index = index % width * turned_stride + index // width
    tl.store(to + index, total.to(to.dtype.element_ty), mask=inside)


def reduce_splits(
    partial: list[Tensor], out: list[Tensor], bias: Tensor | None = None, scaling: float = 1.0, turned: bool = False
) -> None:
    """partial[i] [splits, M, columns i] into out[i] [M, columns i], turned: [columns i, M]; a bias of one out alone."""
    splits, M, _ = partial[0].shape
    columns = tuple(p.shape[2] for p in partial)
    first, programs = [], 0
    for width in columns:
        first.append(programs)
        programs += ceil_div(M * width, SIZE)
    with on_device_of(out[0]):
        reduce_kernel[(programs,)](
            tuple(partial), tuple(out), columns, tuple(first), bias, scaling, M, splits, M if turned else None,
            COUNT=len(out), SIZE=SIZE, num_warps=4, **LAUNCH,
        )  # fmt: skip
