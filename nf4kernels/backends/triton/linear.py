"""linear: y[M, N] = x[M, K] @ W[N, K]^T + scaling * P[M, r] @ B[N, r]^T + bias, straight from the packed bytes.

Who       a program owns BLOCK_M x BLOCK_N of y and sums `depth` of K, BLOCK_K a step. A longer K is split: reduce.py
          adds the fp32 partial sums in order.
Trick     W is the left operand of the dot, acc[N, M] = W @ x^T, so that it is decoded in registers. Of BLOCK_K weights
          the high nibbles are the even k and the low ones the odd k: two dots, with x split the same way, need no
          interleaving. A step of 64 weights has one scale, two (blocks of 32) or four (of 16), loaded once a row and
          spread over the bytes by a reshape: 9 to 10 instructions a weight for each of them, where a step of one block
          of 32 took 12. Ŵ is rounded to x's dtype once, as dense PyTorch on Ŵ would hold it. That costs one
          multiplication a weight more than unscaled levels, whose common rounding errors do not average out (2.06 %
          against 0.26 % of the output for x with a mean of one sigma) unless the host looks at the codebook and waits
          for the device.
Flops     2 M N K; reads 0.516 B a weight: 2.0 us for 4096 x 4096 at an H200's 4.3 TB/s. The loop has 10 instructions a
          weight for each BLOCK_M rows of x (SASS of sm_90, up to 64), 7 of them to decode it, where an H200 can issue
          3.2 at memory speed: 6.4 us. Not measured.
Needs     nothing. Where K is not a multiple of 32, weights are decoded one by one: 52 instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_linear
from .choose import LONGEST_FP32, Choice, choose
from .decode import LAUNCH, ceil_div, decode_elements, lookup, on_device_of, scales_of_bytes
from .dequantize_gemm import multiply_by_slices
from .reduce import reduce_splits


@triton.jit
def add_lora_term(acc, scaling, lora_factor, lora_inner, rank, n, in_n, m, in_m, BLOCK_R: tl.constexpr):
    """scaling * (acc[n, m] + B[n, rank] @ P[m, rank]^T)."""
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        in_rank = (r < rank)[None, :]
        b = tl.load(lora_factor + n[:, None] * rank + r[None, :], mask=in_n[:, None] & in_rank, other=0.0)
        p = tl.load(lora_inner + m[:, None] * rank + r[None, :], mask=in_m[:, None] & in_rank, other=0.0)
        acc = tl.dot(b, tl.trans(p), acc, input_precision="ieee")
    return acc * scaling


@triton.jit
def add_product(
    acc, x, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, n, in_n, K, block_shift, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """acc[BLOCK_N, BLOCK_M] + W[n, begin:end] @ x[m, begin:end]^T."""
    dtype: tl.constexpr = x.dtype.element_ty
    first = n * K
    x_rows = x + m[:, None] * K
    if SCALES > 0:
        table = tl.load(code + tl.arange(0, 16))
        packed_rows = packed + (first >> 1)[:, None]
        for k in range(begin, end, BLOCK_K):
            byte = k // 2 + tl.arange(0, BLOCK_K // 2)
            codes = tl.load(packed_rows + byte[None, :], mask=in_n[:, None], other=0).to(tl.int32)
            block = (first + k) >> block_shift
            scale = scales_of_bytes(
                absmax, scale_absmax, scale_offset, scale_code, block, in_n, SCALES, BLOCK_N, BLOCK_K // 2
            )
            even = (lookup(table, codes >> 4, BLOCK_N, BLOCK_K // 2) * scale).to(dtype)
            odd = (lookup(table, codes & 15, BLOCK_N, BLOCK_K // 2) * scale).to(dtype)
            part = tl.load(x_rows + (k + tl.arange(0, BLOCK_K))[None, :], mask=in_m[:, None], other=0.0)
            x_even, x_odd = tl.split(tl.reshape(part, [BLOCK_M, BLOCK_K // 2, 2]))
            acc = tl.dot(even, tl.trans(x_even), acc, input_precision="ieee")
            acc = tl.dot(odd, tl.trans(x_odd), acc, input_precision="ieee")
    else:
        for step in range(begin, end, BLOCK_K):
            k = step + tl.arange(0, BLOCK_K)
            in_k = (k < end)[None, :]
            w = decode_elements(
                packed, absmax, scale_absmax, scale_offset, code, scale_code, block_shift, first[:, None] + k[None, :],
                in_n[:, None] & in_k, dtype, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            part = tl.load(x_rows + k[None, :], mask=in_m[:, None] & in_k, other=0.0)
            acc = tl.dot(w, tl.trans(part), acc, input_precision="ieee")
    return acc


@triton.jit
def add_runs(
    acc, x, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, n, in_n, K, block_shift, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """add_product in sums of RUN terms each; RUN = 0: in one sum."""
    if RUN == 0:
        acc = add_product(
            acc, x, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, n, in_n, K, block_shift,
            begin, end, BLOCK_M, BLOCK_N, BLOCK_K, SCALES,
        )  # fmt: skip
    else:
        for run in range(begin, end, RUN):
            acc += add_product(
                tl.zeros([BLOCK_N, BLOCK_M], tl.float32), x, m, in_m, packed, absmax, scale_absmax, scale_offset, code,
                scale_code, n, in_n, K, block_shift, run, tl.minimum(run + RUN, end), BLOCK_M, BLOCK_N, BLOCK_K, SCALES,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["M", "tiles_n"])  # where tiles_n = 1 is known, sm_80 gets 64 registers and spills
def linear_kernel(
    x, packed, absmax, scale_absmax, scale_offset, code, scale_code, out, bias, lora_inner, lora_factor, scaling, M, N,
    K, rank, block_shift, depth, tiles_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALES: tl.constexpr, BLOCK_R: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out is [splits, M, N]."""
    split = tl.program_id(1)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n, in_m = n < N, m < M
    n, m = n.to(tl.int64), m.to(tl.int64)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if BLOCK_R > 0:
        rank_here = tl.where(split == 0, rank, 0)
        acc = add_lora_term(acc, scaling, lora_factor, lora_inner, rank_here, n, in_n, m, in_m, BLOCK_R)
    begin = split * depth
    end = tl.minimum(begin + depth, K)
    acc = add_runs(
        acc, x, m, in_m, packed, absmax, scale_absmax, scale_offset, code, scale_code, n, in_n, K, block_shift, begin,
        end, BLOCK_M, BLOCK_N, BLOCK_K, SCALES, RUN,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    at = (split * M.to(tl.int64) + m)[None, :] * N + n[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


def matrix(x: Tensor) -> Tensor:
    """[..., K] as a contiguous [M, K], also for K = 0."""
    return (x.flatten(0, -2) if x.dim() > 1 else x[None]).contiguous()


def rank_step(rank: int) -> int:
    """How much of the rank one dot takes, BLOCK_R: at least 16, a tensor core's step; 0: there is no LoRA term."""
    return 0 if rank == 0 else 16 if rank <= 16 else 32


def multiply_fused(
    choice: Choice, x: Tensor, weight: tuple, out: Tensor, bias: Tensor | None, lora_inner: Tensor | None,
    lora_factor: Tensor | None, scaling: float,
) -> None:  # fmt: skip
    """out[M, N] = x[M, K] @ Ŵ^T + the LoRA term + bias."""
    *tensors, N, K, block_size = weight
    config, M = choice.config, x.shape[0]
    splits = max(ceil_div(K, config.depth), 1) if x.dtype != torch.float32 else 1
    target = out if splits == 1 else x.new_empty((splits, M, N), dtype=torch.float32)
    rank = 0 if lora_factor is None else lora_factor.shape[1]
    tiles_n = ceil_div(N, config.BLOCK_N)
    with on_device_of(x):
        linear_kernel[(tiles_n * ceil_div(M, config.BLOCK_M), splits)](
            x, *tensors, target, bias if splits == 1 else None, lora_inner, lora_factor, scaling, M, N, K,
            rank, block_size.bit_length() - 1, config.depth if splits > 1 else max(K, 1), tiles_n,
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=choice.BLOCK_K, SCALES=choice.scales,
            BLOCK_R=rank_step(rank), RUN=LONGEST_FP32 if x.dtype == torch.float32 else 0, **config.launch, **LAUNCH,
        )  # fmt: skip
    if splits > 1:
        reduce_splits(target, out, bias)


def linear(
    x: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, bias: Tensor | None, lora_P: Tensor | None = None,
    lora_B: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    weight = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    device, M = x.device, x.shape[:-1].numel()
    check_linear(x, *weight, bias, lora_P, lora_B)
    out = x.new_empty((*x.shape[:-1], N))
    if out.numel() == 0:
        return out
    x, y = matrix(x), out.view(M, N)
    choice = choose("linear", M, K, block_size, x.dtype, device)
    if choice.path == "dequantize_gemm":
        multiply_by_slices(False, x, weight, bias, lora_P, lora_B, scaling, y)
    else:
        multiply_fused(choice, x, weight, y, bias, lora_P, lora_B, scaling)
    return out
