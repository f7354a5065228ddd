"""Calls of the grouped products, and the check of what they give, on any device: counts of rows for offsets."""

import torch
from support import cases
from support.cases import Layout
from support.numerics import assert_product_within_bound

LINEAR, DGRAD = "grouped_linear", "grouped_linear_dgrad"
LAYOUTS = (Layout(scale_codebook=None), Layout(32, "fp4", "dynamic8"), Layout(128, "custom", None), Layout(256, "int4"))


def offsets_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def rows_of(counts):
    """(expert, its rows) of every expert."""
    ends = offsets_of(counts).tolist()
    return [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts))]


def call(gpu_ops, op, x, offsets, qweights):
    """On the device, without gradients; `offsets` is a tensor or the counts that it is made of."""
    offsets = offsets if isinstance(offsets, torch.Tensor) else offsets_of(offsets)
    return getattr(gpu_ops.ops, op)(*gpu_ops.move((x, offsets, *qweights.op_args()))).cpu()


def activations(op, rows, qweights, dtype, mean=0.0):
    _, N, K = qweights.shape
    return cases.activations(rows, K if op == LINEAR else N, dtype, mean)


def assert_right(y, op, x, counts, qweights, what):
    """Every expert's rows within DESIGN section 7's bound, and zeros after them."""
    for expert, rows in rows_of(counts):
        w = cases.dense(qweights[expert])
        assert_product_within_bound(y[rows], x[rows], w.T if op == LINEAR else w, f"{op} {what} expert {expert}")
    assert torch.equal(y[sum(counts) :], torch.zeros_like(y[sum(counts) :]))
