"""Which rows or columns of a 4-bit weight one of several ranks may own, and the scales that such a part decodes with.

A superblock's scale is that of 256 consecutive blocks of the whole weight. A part whose blocks are counted anew keeps
those scales only where its rows begin with a superblock; of any other the 8-bit scales are decoded once, to the very
fp32 numbers that every backend decodes them to. Either way the part has the whole weight's bits.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..modes import outside_inference_mode
from ..quantized_weight import SUPERBLOCK, QuantizedWeight, superblocks

ROWS, COLUMNS = 0, 1
Scales = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # absmax, scale_absmax, scale_offset, scale_code
MOST_RANKS = 64  # that a message names


def cut_problem(N: int, K: int, block_size: int, ranks: int, dim: int) -> str | None:
    """Why Ŵ `[N, K]` cannot be cut into `ranks` equal parts, in numbers and with what could; None where it can."""
    if K % block_size:
        return f"in_features={K} must be a multiple of block_size={block_size} for any cut: no block may have two rows"
    if not _fits(N, K, block_size, ranks, dim):
        counts = [str(n) for n in range(1, MOST_RANKS + 1) if _fits(N, K, block_size, n, dim)]
        step = "" if dim == ROWS else f" whole blocks of {block_size},"
        what = f"out_features={N} must be" if dim == ROWS else f"in_features={K} must be{step}"
        return f"{what} the same on each of {ranks} ranks; {', '.join(counts)} would do"
    return None


def _fits(N: int, K: int, block_size: int, ranks: int, dim: int) -> bool:
    return (N if dim == ROWS else K // block_size) % ranks == 0


def part_scales(
    scales: Scales, K: int, block_size: int, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[Scales, bool]:
    """(the scales of Ŵ[rows, columns], whether 8-bit scales were decoded for it).

    Args:
        scales: absmax of that part alone, `[rows, columns / block_size]`; the others of the whole weight.
        K: columns of the whole weight, a multiple of block_size; `columns` are whole blocks.
    """
    absmax, scale_absmax, scale_offset, scale_code = scales
    absmax = absmax.contiguous()
    if scale_absmax is None:
        return (absmax, None, None, scale_code), False
    first, is_whole = rows[0] * (K // block_size), columns == (0, K)
    if is_whole and first % SUPERBLOCK == 0:
        begin, count = first // SUPERBLOCK, superblocks(rows[1] - rows[0], K, block_size)
        return (absmax, scale_absmax[begin : begin + count], scale_offset, scale_code), False
    numbers = decoded_scales(
        absmax,
        scale_absmax,
        scale_offset,
        scale_code,
        K // block_size,
        rows,
        (columns[0] // block_size, columns[1] // block_size),
    )
    return (numbers, None, None, None), True


@torch.compiler.disable  # inductor would contract the two roundings to one
@outside_inference_mode
def decoded_scales(
    absmax: Tensor, scale_absmax: Tensor, scale_offset: Any, scale_code: Any, blocks: int, rows: tuple[int, int],
    columns: tuple[int, int],
) -> Tensor:  # fmt: skip
    """fp32, `scale_code[absmax] * scale_absmax[superblock] + scale_offset`, each operation rounded once.

    `blocks` are those of a whole row, and `columns` count blocks.
    """
    device = absmax.device
    row, column = torch.arange(*rows, device=device)[:, None], torch.arange(*columns, device=device)
    superblock = (row * blocks + column) // SUPERBLOCK
    numbers: Tensor = scale_code[absmax.detach().long()] * scale_absmax[superblock] + scale_offset
    return numbers


def cut(qweight: QuantizedWeight, dim: int, rank: int, ranks: int) -> QuantizedWeight:
    """The rank's equal share of the rows (dim 0) or columns (dim 1), with Ŵ's bits; ValueError where there is none."""
    N, K = qweight.shape
    block_size, order = qweight.block_size, qweight.column_order
    problem = cut_problem(N, K, block_size, ranks, dim)
    if problem is None and dim == COLUMNS and order is not None:
        problem = "the columns must be in their own order for a cut of columns, got act-order"
    if problem is not None:
        raise ValueError(f"nf4kernels.distributed.cut: {problem}")
    rows, columns = part_of(N, K, dim, rank, ranks)
    codes = 8 // qweight.bits  # a byte
    packed = qweight.packed[slice(*rows), columns[0] // codes : columns[1] // codes].contiguous()
    absmax = qweight.absmax[slice(*rows), columns[0] // block_size : columns[1] // block_size]
    whole = (absmax, qweight.scale_absmax, qweight.scale_offset, qweight.scale_code)
    scales, are_decoded = part_scales(whole, K, block_size, rows, columns)
    return replace(
        qweight, packed=packed, absmax=scales[0], scale_absmax=scales[1], scale_offset=scales[2], scale_code=scales[3],
        shape=(rows[1] - rows[0], columns[1] - columns[0]),
        scale_codebook=None if are_decoded else qweight.scale_codebook,
    )  # fmt: skip


def part_of(N: int, K: int, dim: int, rank: int, ranks: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of the rank, half-open."""
    if dim == ROWS:
        return (rank * (N // ranks), (rank + 1) * (N // ranks)), (0, K)
    return (0, N), (rank * (K // ranks), (rank + 1) * (K // ranks))
