"""Rows of several 4-bit matrices put together, in bytes: experts that a file keeps apart, gate beside up."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...quantized_weight import QuantizedExperts, QuantizedWeight

UPPER = 128  # an E4M3 scale is not negative: bit 7 of its byte says in which half of the table it is


def fused(
    load: Callable[[int], QuantizedWeight], begins: list[int], rows: Tensor
) -> QuantizedWeight | QuantizedExperts:
    """The weight whose row r is row `rows[r]` of all matrices one below the other; `[E, N]` rows make E experts.

    Args:
        load: a matrix by its number, called once for every run of its rows.
        begins: the row at which each matrix begins.
        rows: int64 `[N]` or `[E, N]`.

    Raises:
        ValueError: the matrices are of several formats, or their scales or columns cannot stand together.
    """
    first = load(0)
    experts = rows.reshape(-1, rows.shape[-1])
    shape = (*experts.shape, first.shape[1])
    packed = first.packed.new_empty((*experts.shape, first.packed.shape[1]))
    absmax = first.absmax.new_empty((*experts.shape, first.absmax.shape[1]))
    tables = []
    for expert, wanted in enumerate(experts):
        at, spans, found = 0, [], []
        for number, own, count in _runs(wanted, begins):
            matrix = first if number == 0 else load(number)
            _check_alike(first, matrix)
            spans.append(slice(at, at + count))
            packed[expert, spans[-1]] = matrix.packed[own]
            absmax[expert, spans[-1]] = matrix.absmax[own]
            found.append(matrix.scale_code)
            at += count
        if first.scale_code is not None:
            tables.append(_share_table(absmax[expert], spans, found))
    options = (first.dtype, first.block_size, first.codebook, first.scale_codebook)
    scale_code = None if first.scale_code is None else torch.stack(tables)
    if rows.dim() == 1:
        scale_code = None if scale_code is None else scale_code[0]
        whole = (packed[0], absmax[0], None, None, first.code, scale_code, shape[1:])
        return QuantizedWeight(*whole, *options, first.column_order)
    if first.column_order is not None:
        raise ValueError("experts must have their columns in order, got act-order, which QuantExperts do not take")
    return QuantizedExperts(packed, absmax, None, None, first.code, scale_code, shape, *options)


def _runs(rows: Tensor, begins: list[int]) -> Iterator[tuple[int, Any, int]]:
    """(number of the matrix, its own rows, how many) for each run of rows from one; a slice where they follow."""
    numbers = torch.searchsorted(torch.tensor(begins), rows, right=True) - 1
    values, counts = numbers.unique_consecutive(return_counts=True)
    at = 0
    for number, count in zip(values.tolist(), counts.tolist()):
        own = rows[at : at + count] - begins[number]
        first = int(own[0])
        follow = torch.equal(own, torch.arange(first, first + count))
        yield number, slice(first, first + count) if follow else own, count
        at += count


def _check_alike(first: QuantizedWeight, other: QuantizedWeight) -> None:
    for what in ("codebook", "block_size", "scales", "dtype"):
        one, two = getattr(first, what), getattr(other, what)
        if one != two:
            raise ValueError(f"matrices that become one must have one {what}, got {one} and {two}")
    if first.shape[1] != other.shape[1]:
        raise ValueError(f"matrices that become one must have rows of {first.shape[1]}, got {other.shape[1]}")
    orders = first.column_order, other.column_order
    if orders[0] is orders[1] or first.packed.is_meta:
        return
    if orders[0] is None or orders[1] is None or not torch.equal(orders[0], orders[1]):
        raise ValueError("matrices that become one must have their columns in one order, got several (act-order)")


def _share_table(codes: Tensor, spans: list[slice], tables: list[Any]) -> Tensor:
    """The one table of scales for all spans of rows, whose codes become those of it in place.

    Two tables fit: where gate and up have different fp32 scales, entries from 128 on are the second's.
    """
    first = tables[0]
    second: Tensor | None = None
    of_second = []
    for span, table in zip(spans, tables):
        if codes.is_meta or _same(first, table):
            continue
        if second is not None and not _same(second, table):
            raise ValueError("matrices that become one must have two fp32 scales at most, got more")
        second = table
        of_second.append(span)
    if second is None:
        return first
    if (codes >= UPPER).any():
        raise ValueError("weight_scale must not be negative where two fp32 scales meet, got one that is")
    for span in of_second:
        codes[span] |= UPPER
    return torch.cat([first[:UPPER], second[:UPPER]])


def _same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), two.nan_to_num())
