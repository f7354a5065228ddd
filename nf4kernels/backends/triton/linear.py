"""linear: y[M, N] = x[M, K] @ W[N, K]^T + scaling * P[M, r] @ B[N, r]^T + bias, straight from the packed bytes.

Who       a program owns BLOCK_M x BLOCK_N of y and sums `depth` of K, BLOCK_K a step. A longer K is split: reduce.py
          adds the fp32 partial sums in order.
Trick     W is the left operand of the dot, acc[N, M] = W @ x^T. A thread loads words of 8 weights, and joins of shifted
          words put them into its registers in the order of k, so that x needs no reordering and 8 weights go through
          shared memory to the tensor cores by one store. A step has a scale for each of its blocks, loaded once a row
          and spread over the words by a reshape. Up to 16 rows a step is 128 weights, above it 64. Ŵ is rounded to x's
          dtype once, as dense PyTorch on Ŵ would hold it: of unscaled levels the common rounding errors do not average
          out (2.06 % against 0.26 % of the output for x with a mean of one sigma) unless the host looks at the codebook
          and waits for the device.
Rejected  By the SASS of sm_90, instructions a weight for up to 16 rows. Loads of bytes, with high and low nibbles in
          two dots and x split alike: 9.8, a permute a weight more. A dot for each of a word's 8 nibbles: 8.8, 32
          barriers a step. Words spread by a broadcast shift instead of joins: 10.1 in the order of k, 9.8 in that of
          nibbles, as neighbouring weights land in different threads. 128 rows of W for 4 warps: 7.1, but 211
          registers. Not compiled: a table of pairs (256 words, whose bank conflicts take 3.3 cycles a load), of
          levels in two terms with the scale on the sums (1.5 instructions less, 1.5 more).
Flops     2 M N K; reads 0.516 B a weight: 2.0 us for 4096 x 4096 at an H200's 4.3 TB/s. The loop has 7.8 instructions a
          weight for up to 16 rows, 9.5 to 9.8 for each BLOCK_M rows above (SASS of sm_90), where an H200 can issue 3.2
          at memory speed: 4.9 us. Of the 7.8 a shift, a mask, the address, the lookup, the scale and half a conversion
          are 5.5. Not measured.
Needs     nothing; a `packed` that begins between words of 32 bits is copied first. Where K is not a multiple of 32,
          weights are decoded one by one: 52 instructions.
int8      a byte is a weight: the bytes of a step come in the order of k, and there is no lookup.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import check_linear
from .choose import LONGEST_FP32, Choice, choose
from .decode import (
    LAUNCH,
    ceil_div,
    decode_elements,
    decode_int8,
    lookup,
    on_device_of,
    scales_of_bytes,
    whole_words,
    with_int8,
)
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
    if SCALES > 0 and packed.dtype.element_ty == tl.int8:
        for k in range(begin, end, BLOCK_K):
            w = decode_int8(
                packed, absmax, scale_absmax, scale_offset, scale_code, first + k, block_shift, in_n, SCALES, BLOCK_N,
                BLOCK_K,
            ).to(dtype)  # fmt: skip
            part = tl.load(x_rows + (k + tl.arange(0, BLOCK_K))[None, :], mask=in_m[:, None], other=0.0)
            acc = tl.dot(w, tl.trans(part), acc, input_precision="ieee")
    elif SCALES > 0:
        WORDS: tl.constexpr = BLOCK_K // 8
        table = tl.load(code + tl.arange(0, 16))
        word_rows = packed.to(tl.pointer_type(tl.uint32)) + (first >> 3)[:, None]
        for k in range(begin, end, BLOCK_K):
            word = tl.load(word_rows + (k // 8 + tl.arange(0, WORDS))[None, :], mask=in_n[:, None], other=0)
            block = (first + k) >> block_shift
            scale = scales_of_bytes(absmax, scale_absmax, scale_offset, scale_code, block, in_n, SCALES, BLOCK_N, WORDS)
            codes = tl.join(word, word >> 16)
            codes = tl.join(codes, codes >> 8)
            codes = tl.join(codes >> 4, codes) & 15  # the high nibble of a byte is the even k
            codes = tl.reshape(codes.to(tl.int32), [BLOCK_N, BLOCK_K])
            scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [BLOCK_N, WORDS, 8]), [BLOCK_N, BLOCK_K])
            w = (lookup(table, codes, BLOCK_N, BLOCK_K) * scale).to(dtype)
            part = tl.load(x_rows + (k + tl.arange(0, BLOCK_K))[None, :], mask=in_m[:, None], other=0.0)
            acc = tl.dot(w, tl.trans(part), acc, input_precision="ieee")
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
    packed, *tensors, N, K, block_size = weight
    config, M = choice.config, x.shape[0]
    splits = max(ceil_div(K, config.depth), 1) if x.dtype != torch.float32 else 1
    target = out if splits == 1 else x.new_empty((splits, M, N), dtype=torch.float32)
    rank = 0 if lora_factor is None else lora_factor.shape[1]
    tiles_n = ceil_div(N, config.BLOCK_N)
    with on_device_of(x):
        linear_kernel[(tiles_n * ceil_div(M, config.BLOCK_M), splits)](
            x, whole_words(packed), *tensors, target, bias if splits == 1 else None, lora_inner, lora_factor, scaling,
            M, N, K, rank, block_size.bit_length() - 1, config.depth if splits > 1 else max(K, 1), tiles_n,
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
    weight = (with_int8(packed, code), *weight[1:])
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
