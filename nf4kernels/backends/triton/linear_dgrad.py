"""linear_dgrad: dX[M, K] = dY[M, N] @ W[N, K] + scaling * Q[M, r] @ A[r, K], from the same bytes, though the
contraction runs across the rows of W.

Who       a program owns BLOCK_M x BLOCK_K of dX and sums `depth` of N, BLOCK_N a step. A longer N is split, and
          reduce.py adds the fp32 partial sums in order.
Trick     the two nibbles of a byte are neighbours along k, which are neighbours in dX: the even and the odd k have
          accumulators of their own, joined once at the end, not once a step. A row of W has one scale in BLOCK_K, two
          (blocks of 32) or four (of 16), as in linear; a BLOCK_K of one block of 32 took 24 instructions a weight. The
          scale belongs to n, over which the product sums, so Ŵ is scaled and rounded to dY's dtype as for linear.
Flops     2 M N K: 43 us for M = 512, 4096 x 4096 at 400 TFLOP/s. The loop has 13 instructions a weight for each BLOCK_M
          rows of dY (SASS of sm_90, up to 64), and dY is read K / 64 times, from the L2. Not measured.
Needs     nothing. Where K is not a multiple of 32, weights are decoded one by one: 54 instructions.
int8      a byte is a weight: a step's bytes are decoded in the order of k and split into the even and the odd.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_linear_dgrad
from .choose import LONGEST_FP32, Choice, choose
from .decode import (
    LAUNCH,
    ceil_div,
    decode_elements,
    decode_int8,
    lookup,
    on_device_of,
    scales_of_bytes,
    with_int8,
)
from .dequantize_gemm import multiply_by_slices
from .linear import matrix, rank_step
from .reduce import reduce_splits


@triton.jit
def add_product(
    even_sums, odd_sums, dy, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, k_begin,
    block_shift, N, K, begin, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """Both [BLOCK_M, BLOCK_K / 2]: + dY[m, begin:end] @ W[begin:end, k], the even and the odd k from k_begin on."""
    dtype: tl.constexpr = dy.dtype.element_ty
    IS_INT8: tl.constexpr = packed.dtype.element_ty == tl.int8
    if not IS_INT8:
        table = tl.load(code + tl.arange(0, 16))
    for step in range(begin, end, BLOCK_N):
        n = step + tl.arange(0, BLOCK_N)
        in_n = n < end
        part = tl.load(dy + m[:, None] * N + n[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)
        first = n.to(tl.int64) * K + k_begin
        if IS_INT8:
            w = decode_int8(
                packed, absmax, scale_absmax, scale_offset, scale_code, first, block_shift, in_n, SCALES, BLOCK_N,
                BLOCK_K,
            ).to(dtype)  # fmt: skip
            even, odd = tl.split(tl.reshape(w, [BLOCK_N, BLOCK_K // 2, 2]))
        else:
            byte = (first >> 1)[:, None] + tl.arange(0, BLOCK_K // 2)[None, :]
            codes = tl.load(packed + byte, mask=in_n[:, None], other=0).to(tl.int32)
            block = first >> block_shift
            scale = scales_of_bytes(
                absmax, scale_absmax, scale_offset, scale_code, block, in_n, SCALES, BLOCK_N, BLOCK_K // 2
            )
            even = (lookup(table, codes >> 4, BLOCK_N, BLOCK_K // 2) * scale).to(dtype)
            odd = (lookup(table, codes & 15, BLOCK_N, BLOCK_K // 2) * scale).to(dtype)
        even_sums = tl.dot(part, even, even_sums, input_precision="ieee")
        odd_sums = tl.dot(part, odd, odd_sums, input_precision="ieee")
    return even_sums, odd_sums


@triton.jit
def add_runs(
    even_sums, odd_sums, dy, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, k_begin,
    block_shift, N, K, begin, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """add_product in sums of RUN terms each; RUN = 0: in one sum."""
    if RUN == 0:
        even_sums, odd_sums = add_product(
            even_sums, odd_sums, dy, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code,
            k_begin, block_shift, N, K, begin, end, BLOCK_M, BLOCK_N, BLOCK_K, SCALES,
        )  # fmt: skip
    else:
        for run in range(begin, end, RUN):
            zero = tl.zeros([BLOCK_M, BLOCK_K // 2], tl.float32)
            run_even, run_odd = add_product(
                zero, zero, dy, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                k_begin, block_shift, N, K, run, tl.minimum(run + RUN, end), BLOCK_M, BLOCK_N, BLOCK_K,
                SCALES,
            )  # fmt: skip
            even_sums += run_even
            odd_sums += run_odd
    return even_sums, odd_sums


@triton.jit
def add_elements(
    sums, dy, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, k, block_shift, N, K,
    begin, end, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums[m, BLOCK_K] + dY[m, begin:end] @ W[begin:end, k], weights decoded one by one."""
    for step in range(begin, end, BLOCK_N):
        n = step + tl.arange(0, BLOCK_N)
        in_n = n < end
        part = tl.load(dy + m[:, None] * N + n[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)
        w = decode_elements(
            packed, absmax, scale_absmax, scale_offset, code, scale_code, block_shift,
            n.to(tl.int64)[:, None] * K + k[None, :], in_n[:, None] & (k < K)[None, :],
            dy.dtype.element_ty, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sums = tl.dot(part, w, sums, input_precision="ieee")
    return sums


@triton.jit
def lora_term(
    scaling, lora_inner, lora_factor, rank, m, in_m, k, K, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """scaling * Q[m, rank] @ A[rank, k] of WIDTH k."""
    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        in_rank = r < rank
        q = tl.load(lora_inner + m[:, None] * rank + r[None, :], mask=in_m[:, None] & in_rank[None, :], other=0.0)
        a_mask = in_rank[:, None] & (k < K)[None, :]
        a = tl.load(lora_factor + r[:, None].to(tl.int64) * K + k[None, :], mask=a_mask, other=0.0)
        sums = tl.dot(q, a, sums, input_precision="ieee")
    return sums * scaling


@triton.jit(do_not_specialize=["M"])
def linear_dgrad_kernel(
    dy, packed, absmax, scale_absmax, scale_offset, code, scale_code, out, lora_inner, lora_factor, scaling, M, N, K,
    rank, block_shift, depth, tiles_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALES: tl.constexpr, BLOCK_R: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out is [splits, M, K]."""
    split = tl.program_id(1)
    k_begin = tl.program_id(0) % tiles_k * BLOCK_K
    m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    m = m.to(tl.int64)
    k = k_begin + tl.arange(0, BLOCK_K)
    begin = split * depth
    end = tl.minimum(begin + depth, N)
    rank_here = tl.where(split == 0, rank, 0)
    if SCALES > 0:
        HALF: tl.constexpr = BLOCK_K // 2
        even = tl.zeros([BLOCK_M, HALF], tl.float32)
        odd = tl.zeros([BLOCK_M, HALF], tl.float32)
        if BLOCK_R > 0:
            even_k = k_begin + 2 * tl.arange(0, HALF)
            even = lora_term(scaling, lora_inner, lora_factor, rank_here, m, in_m, even_k, K, BLOCK_M, HALF, BLOCK_R)
            odd = lora_term(scaling, lora_inner, lora_factor, rank_here, m, in_m, even_k + 1, K, BLOCK_M, HALF, BLOCK_R)
        even, odd = add_runs(
            even, odd, dy, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, k_begin, block_shift,
            N, K, begin, end, BLOCK_M, BLOCK_N, BLOCK_K, SCALES, RUN,
        )  # fmt: skip
        sums = tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_K])
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        if BLOCK_R > 0:
            sums = lora_term(scaling, lora_inner, lora_factor, rank_here, m, in_m, k, K, BLOCK_M, BLOCK_K, BLOCK_R)
        for run in range(begin, end, RUN if RUN > 0 else depth):
            run_end = tl.minimum(run + (RUN if RUN > 0 else depth), end)
            sums += add_elements(
                tl.zeros([BLOCK_M, BLOCK_K], tl.float32), dy, m, in_m, packed, absmax, scale_absmax, scale_offset,
                code, scale_code, k, block_shift, N, K, run, run_end, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    at = (split * M.to(tl.int64) + m)[:, None] * K + k[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=in_m[:, None] & (k < K)[None, :])


def multiply_fused(
    choice: Choice, dy: Tensor, weight: tuple, out: Tensor, lora_inner: Tensor | None, lora_factor: Tensor | None,
    scaling: float,
) -> None:  # fmt: skip
    """out[M, K] = dy[M, N] @ Ŵ + the LoRA term."""
    *tensors, N, K, block_size = weight
    config, M = choice.config, dy.shape[0]
    splits = max(ceil_div(N, config.depth), 1) if dy.dtype != torch.float32 else 1
    target = out if splits == 1 else dy.new_empty((splits, M, K), dtype=torch.float32)
    rank = 0 if lora_factor is None else lora_factor.shape[0]
    tiles_k = ceil_div(K, choice.BLOCK_K)
    with on_device_of(dy):
        linear_dgrad_kernel[(tiles_k * ceil_div(M, config.BLOCK_M), splits)](
            dy, *tensors, target, lora_inner, lora_factor, scaling, M, N, K,
            rank, block_size.bit_length() - 1, config.depth if splits > 1 else max(N, 1), tiles_k,
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=choice.BLOCK_K, SCALES=choice.scales,
            BLOCK_R=rank_step(rank), RUN=LONGEST_FP32 if dy.dtype == torch.float32 else 0, **config.launch, **LAUNCH,
        )  # fmt: skip
    if splits > 1:
        reduce_splits(target, out)


def linear_dgrad(
    dy: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, lora_Q: Tensor | None = None,
    lora_A: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    weight = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    device, M = dy.device, dy.shape[:-1].numel()
    check_linear_dgrad(dy, *weight, lora_Q, lora_A)
    weight = (with_int8(packed, code), *weight[1:])
    out = dy.new_empty((*dy.shape[:-1], K))
    if out.numel() == 0:
        return out
    dy, dx = matrix(dy), out.view(M, K)
    choice = choose("linear_dgrad", M, K, block_size, dy.dtype, device)
    if choice.path == "dequantize_gemm":
        multiply_by_slices(True, dy, weight, None, lora_Q, lora_A, scaling, dx)
    else:
        multiply_fused(choice, dy, weight, dx, lora_Q, lora_A, scaling)
    return out
