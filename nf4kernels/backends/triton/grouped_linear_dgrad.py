"""grouped_linear_dgrad: dX[T, K] = rows of dY[T, N] @ their expert's W[N, K] + scaling * rows of Q[T, r] @ A[e][r, K],
for E experts in one launch.

Who       a program finds its expert and its tile of BLOCK_M rows as grouped_linear's does, then sums all of N for
          BLOCK_K k of the expert's W, as linear_dgrad's does.
Trick     linear_dgrad's, with grouped_linear's search for the tile. Rejected for grouped_linear's reasons:
          dequantize + GEMM, splits.
Flops     2 T N K; reads each active expert's 0.516 B a weight for every BLOCK_M of its rows, all but the first time
          from the L2. The loop is linear_dgrad's. Not measured.
Needs     K a multiple of 64 and of the block size.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_grouped_linear_dgrad
from .choose import choose_for_experts
from .decode import LAUNCH, on_device_of, with_int8
from .grouped_linear import find_group, most_tiles, run_of, superblocks_of, weight_of
from .linear import rank_step
from .linear_dgrad import add_runs, lora_term


@triton.jit(do_not_specialize=["T"])
def grouped_linear_dgrad_kernel(
    dy, offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, out, lora_inner, lora_factor, scaling,
    T, E, N, K, rank, block_shift, superblocks, tiles_k, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALES: tl.constexpr, BLOCK_R: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    expert, m_begin, m_end = find_group(offsets, tl.program_id(0) // tiles_k, T, E, EXPERTS, BLOCK_M)
    if m_begin >= m_end:
        return
    packed, absmax, scale_absmax, scale_offset, scale_code = weight_of(
        packed, absmax, scale_absmax, scale_offset, scale_code, expert, N, K, block_shift, superblocks
    )
    k_begin = tl.program_id(0) % tiles_k * BLOCK_K
    m = m_begin + tl.arange(0, BLOCK_M)
    in_m = m < m_end
    m = m.to(tl.int64)
    HALF: tl.constexpr = BLOCK_K // 2
    even = tl.zeros([BLOCK_M, HALF], tl.float32)
    odd = tl.zeros([BLOCK_M, HALF], tl.float32)
    if BLOCK_R > 0:
        lora_factor += expert.to(tl.int64) * rank * K
        rank_here = tl.where(expert < E, rank, 0)
        even_k = k_begin + 2 * tl.arange(0, HALF)
        even = lora_term(scaling, lora_inner, lora_factor, rank_here, m, in_m, even_k, K, BLOCK_M, HALF, BLOCK_R)
        odd = lora_term(scaling, lora_inner, lora_factor, rank_here, m, in_m, even_k + 1, K, BLOCK_M, HALF, BLOCK_R)
    even, odd = add_runs(
        even, odd, dy, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, k_begin, block_shift, N,
        K, 0, tl.where(expert < E, N, 0), BLOCK_M, BLOCK_N, BLOCK_K, SCALES, RUN,
    )  # fmt: skip
    sums = tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_K])
    at = m[:, None] * K + (k_begin + tl.arange(0, BLOCK_K))[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=in_m[:, None])


def grouped_linear_dgrad(
    dy: Tensor, expert_offsets: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None,
    scale_offset: Tensor | None, code: Tensor, scale_code: Tensor | None, N: int, K: int, block_size: int,
    lora_Q: Tensor | None = None, lora_A: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    tensors = (absmax, scale_absmax, scale_offset, code, scale_code)
    check_grouped_linear_dgrad(dy, expert_offsets, packed, *tensors, N, K, block_size, lora_Q, lora_A, scaling)
    T, E = dy.shape[0], expert_offsets.shape[0]
    out = dy.new_empty((T, K))
    if out.numel() == 0:
        return out
    choice = choose_for_experts("grouped_linear_dgrad", T, E, K, block_size, N, dy.dtype, dy.device)
    config, tiles_k = choice.config, K // choice.BLOCK_K
    packed = with_int8(packed, code)
    rank = 0 if lora_A is None else lora_A.shape[1]
    with on_device_of(dy):
        grouped_linear_dgrad_kernel[(tiles_k * most_tiles(T, E, config.BLOCK_M),)](
            dy.contiguous(), expert_offsets, packed, *tensors, out, lora_Q, lora_A, scaling, T, E, N, K, rank,
            block_size.bit_length() - 1, superblocks_of(N, K, block_size), tiles_k,
            EXPERTS=triton.next_power_of_2(E + 1), BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
            BLOCK_K=choice.BLOCK_K, SCALES=choice.scales, BLOCK_R=rank_step(rank), RUN=run_of(N, dy.dtype),
            **config.launch, **LAUNCH,
        )  # fmt: skip
    return out
