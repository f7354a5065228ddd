"""linear: y[M, N] = x[M, K] @ W[N, K]^T + scaling * P[M, r] @ B[N, r]^T + bias, straight from the packed bytes.

Who       a program sums `depth` of the contraction for COLUMNS rows of W by ROWS rows of x (tokens); with more than
          one part of K, partial sums in fp32 are added up in order by reduce.py. Several weights that share x are more
          columns of one launch.
Trick     W is the left operand of the dot, acc[N, M] = W @ x^T, so that it is decoded in registers; the high nibbles
          of BLOCK weights are their even k and the low ones the odd k: two dots, with x split the same way, need no
          interleaving. Ŵ is rounded to x's dtype once, as dense PyTorch on Ŵ would hold it: one multiplication a
          weight more than levels multiplied unscaled, whose common rounding errors do not average out (2.06 % against
          0.26 % of the output for x with a mean of one sigma) unless the host looks at the codebook and waits for the
          device.
Flops     2 M N K; reads 0.516 B a weight: 2.0 us for 4096 x 4096 at an H200's 4.3 TB/s. The loop has 10 instructions a
          weight for each ROWS tokens (SASS of sm_90, up to 64 tokens), 7 of them to decode it, where an H200 can issue
          3.2 at memory speed: 6.4 us. Not measured.
Needs     nothing. Where rows of W are not whole blocks of 32 or 64, weights are decoded one by one: 52 instructions.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantized_weight import QuantizedWeight
from ..arguments import check_data, check_input, check_low_rank, check_weight
from .choose import LONGEST_FP32, Choice, choose
from .decode import LAUNCH, block_scales, ceil_div, decode_elements, lookup, on_device_of
from .panels import multiply_panels
from .reduce import pick, reduce_splits

ELEMENTS = 32  # k of a step where weights are decoded one by one


@triton.jit
def add_low_rank(acc, scaling, factor, small, rank, column, in_columns, token, in_tokens, RANK: tl.constexpr):
    """scaling * (acc [columns, tokens] + factor[column, rank] @ small[token, rank]^T)."""
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        in_rank = (r < rank)[None, :]
        f = tl.load(factor + column[:, None] * rank + r[None, :], mask=in_columns[:, None] & in_rank, other=0.0)
        p = tl.load(small + token[:, None] * rank + r[None, :], mask=in_tokens[:, None] & in_rank, other=0.0)
        acc = tl.dot(f, tl.trans(p), acc, input_precision="ieee")
    return acc * scaling


@triton.jit
def add_product(
    acc, x, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code, column, in_columns, K,
    block_shift, begin, end, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """acc [COLUMNS, ROWS] + W[column, begin:end] @ x[token, begin:end]^T."""
    dtype: tl.constexpr = x.dtype.element_ty
    first = column * K
    tokens = x + token[:, None] * K
    if WHOLE:
        table = tl.load(code + tl.arange(0, 16))
        bytes_of_row = packed + (first >> 1)[:, None]
        for k in range(begin, end, BLOCK):
            byte = k // 2 + tl.arange(0, BLOCK // 2)
            codes = tl.load(bytes_of_row + byte[None, :], mask=in_columns[:, None], other=0).to(tl.int32)
            block = (first + k) >> block_shift
            scale = block_scales(absmax, scale_absmax, scale_offset, scale_code, block, in_columns)[:, None]
            even = (lookup(table, codes >> 4, COLUMNS, BLOCK // 2) * scale).to(dtype)
            odd = (lookup(table, codes & 15, COLUMNS, BLOCK // 2) * scale).to(dtype)
            part = tl.load(tokens + (k + tl.arange(0, BLOCK))[None, :], mask=in_tokens[:, None], other=0.0)
            x_even, x_odd = tl.split(tl.reshape(part, [ROWS, BLOCK // 2, 2]))
            acc = tl.dot(even, tl.trans(x_even), acc, input_precision="ieee")
            acc = tl.dot(odd, tl.trans(x_odd), acc, input_precision="ieee")
    else:
        for step in range(begin, end, BLOCK):
            k = step + tl.arange(0, BLOCK)
            in_depth = (k < end)[None, :]
            w = decode_elements(
                packed, absmax, scale_absmax, scale_offset, code, scale_code, block_shift, first[:, None] + k[None, :],
                in_columns[:, None] & in_depth, dtype, COLUMNS, BLOCK,
            )  # fmt: skip
            part = tl.load(tokens + k[None, :], mask=in_tokens[:, None] & in_depth, other=0.0)
            acc = tl.dot(w, tl.trans(part), acc, input_precision="ieee")
    return acc


@triton.jit
def add_runs(
    acc, x, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code, column, in_columns, K,
    block_shift, begin, end, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """add_product by sums of RUN terms each; 0: by one."""
    if RUN == 0:
        acc = add_product(
            acc, x, token, in_tokens, packed, absmax, scale_absmax, scale_offset, code, scale_code, column, in_columns,
            K, block_shift, begin, end, COLUMNS, ROWS, BLOCK, WHOLE,
        )  # fmt: skip
    else:
        for run in range(begin, end, RUN):
            acc += add_product(
                tl.zeros([COLUMNS, ROWS], tl.float32), x, token, in_tokens, packed, absmax, scale_absmax, scale_offset,
                code, scale_code, column, in_columns, K, block_shift, run, tl.minimum(run + RUN, end), COLUMNS, ROWS,
                BLOCK, WHOLE,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, packed, absmax, scale_absmax, scale_offset, code, scale_code, out, columns, tile_of_first, tiles, bias, small,
    factor, scaling, M, K, rank, block_shift, depth, COUNT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, RANK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The weights, out and columns (N) are tuples of COUNT. Out is [splits, M, N]."""
    tile, split = tl.program_id(0) % tiles, tl.program_id(1)
    N = pick(columns, COUNT, tile, tile_of_first)
    column = (tile - pick(tile_of_first, COUNT, tile, tile_of_first)) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    in_columns, in_tokens = column < N, token < M
    column, token = column.to(tl.int64), token.to(tl.int64)

    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    if RANK > 0:
        in_first = tl.where(split == 0, rank, 0)
        acc = add_low_rank(acc, scaling, factor, small, in_first, column, in_columns, token, in_tokens, RANK)

    of_tile_packed = pick(packed, COUNT, tile, tile_of_first)
    of_tile_absmax = pick(absmax, COUNT, tile, tile_of_first)
    of_tile_code = pick(code, COUNT, tile, tile_of_first)
    of_tile_scale_absmax = scale_absmax[0]
    of_tile_scale_offset = scale_offset[0]
    of_tile_scale_code = scale_code[0]
    if of_tile_scale_code is not None:
        of_tile_scale_absmax = pick(scale_absmax, COUNT, tile, tile_of_first)
        of_tile_scale_offset = pick(scale_offset, COUNT, tile, tile_of_first)
        of_tile_scale_code = pick(scale_code, COUNT, tile, tile_of_first)
    begin = split * depth
    end = tl.minimum(begin + depth, K)
    acc = add_runs(
        acc, x, token, in_tokens, of_tile_packed, of_tile_absmax, of_tile_scale_absmax, of_tile_scale_offset,
        of_tile_code, of_tile_scale_code, column, in_columns, K, block_shift, begin, end, COLUMNS, ROWS, BLOCK, WHOLE,
        RUN,
    )  # fmt: skip

    if bias is not None:
        acc += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[:, None]
    of_tile_out = pick(out, COUNT, tile, tile_of_first)
    at = (split * M.to(tl.int64) + token)[None, :] * N + column[:, None]
    tl.store(of_tile_out + at, acc.to(of_tile_out.dtype.element_ty), mask=in_columns[:, None] & in_tokens[None, :])


def matrix(x: Tensor) -> Tensor:
    """[..., K] as a contiguous [M, K], also for K = 0."""
    return (x.flatten(0, -2) if x.dim() > 1 else x[None]).contiguous()


def rank_step(factor: Tensor | None, rank_dim: int) -> int:
    """Of the rank, how much a dot takes at once: 16 is the least of a tensor core's step."""
    return 0 if factor is None or factor.shape[rank_dim] == 0 else 16 if factor.shape[rank_dim] <= 16 else 32


def multiply_fused(
    choice: Choice, x: Tensor, weights: Sequence[tuple], outs: Sequence[Tensor], bias: Tensor | None,
    small: Tensor | None, factor: Tensor | None, scaling: float,
) -> None:  # fmt: skip
    """outs[i] [M, N_i] = x [M, K] @ Ŵ_i^T; the other terms are those of a single weight."""
    config, (M, K) = choice.config, x.shape
    splits = max(ceil_div(K, config.depth), 1) if x.dtype != torch.float32 else 1
    targets = outs
    if splits > 1:
        targets = [x.new_empty((splits, M, out.shape[1]), dtype=torch.float32) for out in outs]
    first, tiles = [], 0
    for out in outs:
        first.append(tiles)
        tiles += ceil_div(out.shape[1], config.columns)
    packed, absmax, scale_absmax, scale_offset, code, scale_code = zip(*(weight[:6] for weight in weights))
    RANK = rank_step(factor, 1)
    with on_device_of(x):
        linear_kernel[(tiles * ceil_div(M, config.rows), splits)](
            x, packed, absmax, scale_absmax, scale_offset, code, scale_code, tuple(targets),
            tuple(out.shape[1] for out in outs), tuple(first), tiles, bias if splits == 1 else None, small, factor,
            scaling, M, K, 0 if RANK == 0 else factor.shape[1], weights[0][8].bit_length() - 1,
            config.depth if splits > 1 else max(K, 1), COUNT=len(outs), COLUMNS=config.columns, ROWS=config.rows,
            BLOCK=choice.block or ELEMENTS, WHOLE=choice.block > 0, RANK=RANK,
            RUN=LONGEST_FP32 if x.dtype == torch.float32 else 0, **config.launch, **LAUNCH,
        )  # fmt: skip
    if splits > 1:
        reduce_splits(targets, list(outs), bias)


def linear(
    x: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, bias: Tensor | None, lora_P: Tensor | None = None,
    lora_B: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    weight = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    device, rows = x.device, x.shape[:-1].numel()
    check_weight("linear", device, *weight)
    check_input("linear", device, "x", x, "K", K)
    if bias is not None:
        check_data("linear", device, "bias", bias, x.dtype, N)
    check_low_rank("linear", device, ("lora_P", "lora_B"), lora_P, lora_B, 1, x.dtype, rows, N)
    out = x.new_empty((*x.shape[:-1], N))
    if out.numel() == 0:
        return out
    x, y = matrix(x), out.view(rows, N)
    choice = choose("linear", rows, K, block_size, x.dtype, device)
    if choice.path == "panel":
        multiply_panels(False, x, weight, bias, lora_P, lora_B, scaling, y)
    else:
        multiply_fused(choice, x, [weight], [y], bias, lora_P, lora_B, scaling)
    return out


def linear_shared(x: Tensor, qweights: Sequence[QuantizedWeight]) -> list[Tensor]:
    """[x @ Ŵ.T for each weight], in one launch (attention's q, k, v; an MLP's gate and up), bit for bit separate calls.

    Args:
        x: `[..., K]` as linear's.
        qweights: of the same K and block size, all double-quantized or none.

    Raises:
        ValueError: there is no weight, or they differ. RuntimeError: as linear.
    """
    kinds = {(qweight.shape[1], qweight.block_size, qweight.double_quant) for qweight in qweights}
    if len(kinds) != 1:
        came = sorted(kinds)
        raise ValueError(
            "nf4kernels.linear_shared: qweights must be at least one, of one K, block size and double quantization,"
            f" got (K, block size, double quantization) {came}"
        )
    ((K, block_size, _),) = kinds
    weights = [qweight.op_args() for qweight in qweights]
    for weight in weights:
        check_weight("linear_shared", x.device, *weight)
    check_input("linear_shared", x.device, "x", x, "K", K)
    rows = x.shape[:-1].numel()
    outs = [x.new_empty((*x.shape[:-1], weight[6])) for weight in weights]
    filled = [(weight, out.view(rows, weight[6])) for weight, out in zip(weights, outs) if out.numel()]
    if not filled:
        return outs
    x = matrix(x)
    choice = choose("linear", rows, K, block_size, x.dtype, x.device)
    if choice.path == "panel":
        for weight, y in filled:
            multiply_panels(False, x, weight, None, None, None, 1.0, y)
    else:
        multiply_fused(choice, x, *zip(*filled), None, None, None, 1.0)
    return outs
