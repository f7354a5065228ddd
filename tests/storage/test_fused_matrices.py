"""Rows of 4-bit matrices put together in bytes, wherever they are to go."""

from dataclasses import replace

import pytest
import torch

import nf4kernels as nf4
from nf4kernels.storage.published.fused import fused

N, K = 6, 64


def matrices(count, codebook="nvfp4"):
    return [nf4.quantize((1 + i) * torch.randn(N, K), codebook=codebook) for i in range(count)]


def dense(weight):
    each = list(weight) if isinstance(weight, nf4.QuantizedExperts) else [weight]
    return torch.stack([nf4.dequantize(one, torch.float32) for one in each])


@pytest.mark.parametrize("codebook", ["nvfp4", "mxfp4", "int4_symmetric"])
def test_rows_go_where_they_are_sent(codebook):
    """Two matrices an expert, whole, in pieces and in any order: what a model's own conversion makes of them."""
    parts = matrices(4, codebook)
    below = torch.cat([nf4.dequantize(part, torch.float32) for part in parts])
    whole = torch.arange(4 * N).view(2, 2 * N)
    interleaved = whole.view(2, 2, N).transpose(1, 2).reshape(2, 2 * N)
    for rows in (whole, interleaved, whole[:, torch.randperm(2 * N)], whole[:, N:]):
        made = fused(parts.__getitem__, [0, N, 2 * N, 3 * N], rows)
        assert torch.equal(dense(made), below[rows])
    one = fused(parts.__getitem__, [0, N, 2 * N, 3 * N], torch.arange(2 * N))
    assert isinstance(one, nf4.QuantizedWeight)
    assert torch.equal(dense(one)[0], below[: 2 * N])


def test_what_cannot_stand_together_is_refused():
    begins, rows = [0, N, 2 * N], torch.arange(3 * N)[None]
    with pytest.raises(ValueError, match="two fp32 scales at most, got more"):
        fused(matrices(3).__getitem__, begins, rows)
    negative = matrices(2)
    negative[1] = replace(negative[1], absmax=negative[1].absmax | 128)
    with pytest.raises(ValueError, match="must not be negative where two fp32 scales meet"):
        fused(negative.__getitem__, begins[:2], rows[:, : 2 * N])
    mixed = [*matrices(1), *matrices(1, "mxfp4")]
    with pytest.raises(ValueError, match="must have one codebook, got nvfp4 and mxfp4"):
        fused(mixed.__getitem__, begins[:2], rows[:, : 2 * N])
    order = torch.randperm(K, dtype=torch.int32)
    permuted = [replace(each, column_order=order) for each in matrices(2, "int4_symmetric")]
    with pytest.raises(ValueError, match="experts must have their columns in order, got act-order"):
        fused(permuted.__getitem__, begins[:2], rows[:, : 2 * N])
    assert fused(permuted.__getitem__, begins[:2], rows[0, : 2 * N]).column_order is order
    permuted[1] = replace(permuted[1], column_order=order.flip(0))
    with pytest.raises(ValueError, match=r"must have their columns in one order, got several \(act-order\)"):
        fused(permuted.__getitem__, begins[:2], rows[0, : 2 * N])
