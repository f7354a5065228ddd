"""Stacked experts' rows: counts for offsets, and the check of what a grouped product gives."""

import torch
from support import cases
from support.cases import Layout
from support.numerics import assert_product_within_bound

LAYOUTS = (
    Layout(),
    Layout(scale_codebook=None),
    Layout(32, "fp4", "dynamic8"),
    Layout(128, "custom", None),
    Layout(256, "int4"),
)


def offsets_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def rows_of(counts):
    """(expert, its rows) of every expert."""
    ends = offsets_of(counts).tolist()
    return [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts))]


def assert_right(y, op, x, counts, qweights, what):
    """Every expert's rows within the bound of docs/design.md, section 7, and zeros after them."""
    for expert, rows in rows_of(counts):
        w = cases.dense(qweights[expert])
        matrix = w if op.endswith("dgrad") else w.T
        assert_product_within_bound(y[rows], x[rows], matrix, f"{op} {what} expert {expert}")
    assert torch.equal(y[sum(counts) :], torch.zeros_like(y[sum(counts) :]))
