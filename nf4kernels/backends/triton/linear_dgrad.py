"""linear_dgrad: dX[M, K] = dY[M, N] @ W[N, K] + scaling * Q[M, r] @ A[r, K], from the same bytes, though the
contraction runs across the rows of W.

Who       a program sums `depth` rows of W for BLOCK columns of it by ROWS rows of dY, DEPTH rows of W a step; with
          more than one part of N, partial sums in fp32 are added up in order by reduce.py.
Trick     bytes hold neighbours along k, which are neighbours in dX: high and low nibbles go to sums of their own,
          joined once at the end, not once a step. The columns of a program share a block of scales, so that a row of W
          has one scale; it belongs to n, which is summed over, so Ŵ is scaled and rounded to dY's dtype as for linear.
Flops     2 M N K: 43 us for M = 512, 4096 x 4096 at 400 TFLOP/s. The loop has 13 instructions a weight for each ROWS
          rows of dY (SASS of sm_90, up to 64 rows), and dY is read K / 64 times, out of the L2. Not measured.
Needs     nothing. Where rows of W are not whole blocks of 32 or 64, weights are decoded one by one: 54 instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_input, check_low_rank, check_weight
from .choose import LONGEST_FP32, Choice, choose
from .decode import LAUNCH, block_scales, ceil_div, decode_elements, lookup, on_device_of
from .linear import matrix, rank_step
from .panels import multiply_panels
from .reduce import reduce_splits

DEPTH = 32  # rows of W a step


@triton.jit
def add_product(
    even_sums, odd_sums, dy, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code, column,
    block_shift, N, K, begin, end, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Both [ROWS, BLOCK / 2] + dY[token, begin:end] @ W[begin:end, column + 2i (+ 1)]."""
    dtype: tl.constexpr = dy.dtype.element_ty
    table = tl.load(code + tl.arange(0, 16))
    for step in range(begin, end, DEPTH):
        n = step + tl.arange(0, DEPTH)
        in_depth = n < end
        part = tl.load(dy + token[:, None] * N + n[None, :], mask=in_tokens[:, None] & in_depth[None, :], other=0.0)
        first = n.to(tl.int64) * K + column
        byte = (first >> 1)[:, None] + tl.arange(0, BLOCK // 2)[None, :]
        codes = tl.load(packed + byte, mask=in_depth[:, None], other=0).to(tl.int32)
        scale = block_scales(absmax, scale_absmax, scale_offset, scale_code, first >> block_shift, in_depth)[:, None]
        even = (lookup(table, codes >> 4, DEPTH, BLOCK // 2) * scale).to(dtype)
        odd = (lookup(table, codes & 15, DEPTH, BLOCK // 2) * scale).to(dtype)
        even_sums = tl.dot(part, even, even_sums, input_precision="ieee")
        odd_sums = tl.dot(part, odd, odd_sums, input_precision="ieee")
    return even_sums, odd_sums


@triton.jit
def add_runs(
    even_sums, odd_sums, dy, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code, column,
    block_shift, N, K, begin, end, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """add_product by sums of RUN terms each; 0: by one."""
    if RUN == 0:
        even_sums, odd_sums = add_product(
            even_sums, odd_sums, dy, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code,
            column, block_shift, N, K, begin, end, ROWS, BLOCK, DEPTH,
        )  # fmt: skip
    else:
        for run in range(begin, end, RUN):
            zero = tl.zeros([ROWS, BLOCK // 2], tl.float32)
            run_even, run_odd = add_product(
                zero, zero, dy, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                column, block_shift, N, K, run, tl.minimum(run + RUN, end), ROWS, BLOCK, DEPTH,
            )  # fmt: skip
            even_sums += run_even
            odd_sums += run_odd
    return even_sums, odd_sums


@triton.jit
def add_elements(
    sums, dy, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code, columns, block_shift, N,
    K, begin, end, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """sums [rows, BLOCK] + dY[token, begin:end] @ W[begin:end, columns]."""
    for step in range(begin, end, DEPTH):
        n = step + tl.arange(0, DEPTH)
        in_depth = n < end
        part = tl.load(dy + token[:, None] * N + n[None, :], mask=in_tokens[:, None] & in_depth[None, :], other=0.0)
        w = decode_elements(
            packed, absmax, scale_absmax, scale_offset, code, scale_code, block_shift,
            n.to(tl.int64)[:, None] * K + columns[None, :], in_depth[:, None] & (columns < K)[None, :],
            dy.dtype.element_ty, DEPTH, BLOCK,
        )  # fmt: skip
        sums = tl.dot(part, w, sums, input_precision="ieee")
    return sums


@triton.jit
def low_rank_sums(
    scaling, small, factor, rank, token, in_tokens, columns, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """scaling * small[token, rank] @ factor[rank, columns]."""
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        in_rank = r < rank
        q = tl.load(small + token[:, None] * rank + r[None, :], mask=in_tokens[:, None] & in_rank[None, :], other=0.0)
        a_mask = in_rank[:, None] & (columns < K)[None, :]
        a = tl.load(factor + r[:, None].to(tl.int64) * K + columns[None, :], mask=a_mask, other=0.0)
        sums = tl.dot(q, a, sums, input_precision="ieee")
    return sums * scaling


@triton.jit(do_not_specialize=["M"])
def linear_dgrad_kernel(
    dy, packed, absmax, scale_absmax, scale_offset, code, scale_code, out, small, factor, scaling, M, N, K, rank,
    block_shift, depth, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    RANK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Out is [splits, M, K]."""
    split = tl.program_id(1)
    column = tl.program_id(0) % tiles * BLOCK
    token = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    in_tokens = token < M
    token = token.to(tl.int64)
    columns = column + tl.arange(0, BLOCK)
    begin = split * depth
    end = tl.minimum(begin + depth, N)
    in_first = tl.where(split == 0, rank, 0)
    if WHOLE:
        HALF: tl.constexpr = BLOCK // 2
        even = tl.zeros([ROWS, HALF], tl.float32)
        odd = tl.zeros([ROWS, HALF], tl.float32)
        if RANK > 0:
            pairs = column + 2 * tl.arange(0, HALF)
            even = low_rank_sums(scaling, small, factor, in_first, token, in_tokens, pairs, K, ROWS, HALF, RANK)
            odd = low_rank_sums(scaling, small, factor, in_first, token, in_tokens, pairs + 1, K, ROWS, HALF, RANK)
        even, odd = add_runs(
            even, odd, dy, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code, column,
            block_shift, N, K, begin, end, ROWS, BLOCK, DEPTH, RUN,
        )  # fmt: skip
        sums = tl.reshape(tl.join(even, odd), [ROWS, BLOCK])
    else:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        if RANK > 0:
            sums = low_rank_sums(scaling, small, factor, in_first, token, in_tokens, columns, K, ROWS, BLOCK, RANK)
        for run in range(begin, end, RUN if RUN > 0 else depth):
            run_end = tl.minimum(run + (RUN if RUN > 0 else depth), end)
            sums += add_elements(
                tl.zeros([ROWS, BLOCK], tl.float32), dy, token, in_tokens, packed, absmax, scale_absmax, scale_offset,
                code, scale_code, columns, block_shift, N, K, run, run_end, BLOCK, DEPTH,
            )  # fmt: skip
    at = (split * M.to(tl.int64) + token)[:, None] * K + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=in_tokens[:, None] & (columns < K)[None, :])


def multiply_fused(
    choice: Choice, dy: Tensor, weight: tuple, out: Tensor, small: Tensor | None, factor: Tensor | None, scaling: float
) -> None:
    """out [M, K] = dy [M, N] @ Ŵ and LoRA's term."""
    *tensors, N, K, block_size = weight
    config, M = choice.config, dy.shape[0]
    splits = max(ceil_div(N, config.depth), 1) if dy.dtype != torch.float32 else 1
    target = out if splits == 1 else dy.new_empty((splits, M, K), dtype=torch.float32)
    RANK = rank_step(factor, 0)
    BLOCK = choice.block or config.columns
    tiles = ceil_div(K, BLOCK)
    with on_device_of(dy):
        linear_dgrad_kernel[(tiles * ceil_div(M, config.rows), splits)](
            dy, *tensors, target, small, factor, scaling, M, N, K, 0 if RANK == 0 else factor.shape[0],
            block_size.bit_length() - 1, config.depth if splits > 1 else max(N, 1), tiles, ROWS=config.rows,
            BLOCK=BLOCK, DEPTH=DEPTH, WHOLE=choice.block > 0, RANK=RANK,
            RUN=LONGEST_FP32 if dy.dtype == torch.float32 else 0, **config.launch, **LAUNCH,
        )  # fmt: skip
    if splits > 1:
        reduce_splits([target], [out])


def linear_dgrad(
    dy: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, lora_Q: Tensor | None = None,
    lora_A: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    weight = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    device, rows = dy.device, dy.shape[:-1].numel()
    check_weight("linear_dgrad", device, *weight)
    check_input("linear_dgrad", device, "dy", dy, "N", N)
    check_low_rank("linear_dgrad", device, ("lora_Q", "lora_A"), lora_Q, lora_A, 0, dy.dtype, rows, K)
    out = dy.new_empty((*dy.shape[:-1], K))
    if out.numel() == 0:
        return out
    dy, dx = matrix(dy), out.view(rows, K)
    choice = choose("linear_dgrad", rows, K, block_size, dy.dtype, device)
    if choice.path == "panel":
        multiply_panels(True, dy, weight, None, lora_Q, lora_A, scaling, dx)
    else:
        multiply_fused(choice, dy, weight, dx, lora_Q, lora_A, scaling)
    return out
