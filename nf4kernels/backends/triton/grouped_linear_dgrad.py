"""grouped_linear_dgrad: dX[T, K] = rows of dY[T, N] @ their expert's W[N, K], for E experts in one launch.

Who       a program finds its (expert, tile of ROWS rows) as grouped_linear's does, then sums all rows of that expert's
          W for BLOCK columns of it, as linear_dgrad's does.
Trick     linear_dgrad's, and grouped_linear's way to a tile. Rejected for grouped_linear's reasons: panels, splits.
Flops     2 T N K; reads each active expert's 0.516 B a weight for every ROWS of its rows, but for the first time out of
          the L2. The loop is linear_dgrad's. Not measured.
Needs     K a multiple of 64 and of the block size.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_experts
from .choose import choose_for_experts
from .decode import LAUNCH, on_device_of
from .grouped_linear import find_group, most_tiles, run_of, superblocks_of, weight_of
from .linear_dgrad import DEPTH, add_runs


@triton.jit(do_not_specialize=["T"])
def grouped_linear_dgrad_kernel(
    dy, offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, out, T, E, N, K, block_shift,
    superblocks, tiles, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    expert, row, end = find_group(offsets, tl.program_id(0) // tiles, T, E, EXPERTS, ROWS)
    if row >= end:
        return
    packed, absmax, scale_absmax, scale_offset = weight_of(
        packed, absmax, scale_absmax, scale_offset, expert, N, K, block_shift, superblocks
    )
    column = tl.program_id(0) % tiles * BLOCK
    token = row + tl.arange(0, ROWS)
    in_tokens = token < end
    token = token.to(tl.int64)
    zero = tl.zeros([ROWS, BLOCK // 2], tl.float32)
    even, odd = add_runs(
        zero, zero, dy, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code, column,
        block_shift, N, K, 0, tl.where(expert < E, N, 0), ROWS, BLOCK, DEPTH, RUN,
    )  # fmt: skip
    sums = tl.reshape(tl.join(even, odd), [ROWS, BLOCK])
    at = token[:, None] * K + (column + tl.arange(0, BLOCK))[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=in_tokens[:, None])


def grouped_linear_dgrad(
    dy: Tensor, expert_offsets: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None,
    scale_offset: Tensor | None, code: Tensor, scale_code: Tensor | None, N: int, K: int, block_size: int,
) -> Tensor:  # fmt: skip
    tensors = (packed, absmax, scale_absmax, scale_offset, code, scale_code)
    check_experts("grouped_linear_dgrad", "dy", dy, expert_offsets, (*tensors, N, K, block_size), "N", N)
    T, E = dy.shape[0], expert_offsets.shape[0]
    out = dy.new_empty((T, K))
    if out.numel() == 0:
        return out
    choice = choose_for_experts("grouped_linear_dgrad", T, E, K, block_size, N, dy.dtype, dy.device)
    config, tiles = choice.config, K // choice.block
    with on_device_of(dy):
        grouped_linear_dgrad_kernel[(tiles * most_tiles(T, E, config.rows),)](
            dy.contiguous(), expert_offsets, *tensors, out, T, E, N, K, block_size.bit_length() - 1,
            superblocks_of(N, K, block_size), tiles, EXPERTS=triton.next_power_of_2(E + 1), ROWS=config.rows,
            BLOCK=choice.block, DEPTH=DEPTH, RUN=run_of(N, dy.dtype), **config.launch, **LAUNCH,
        )  # fmt: skip
    return out
