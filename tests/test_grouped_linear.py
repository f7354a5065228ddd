"""grouped_linear and its gradient: the bits of linear on each expert's rows, whatever rows the others have."""

import cases
import pytest
import torch
from cases import DTYPES, Layout, dtype_id, shape_id
from numerics import assert_product_within_bound, assert_same_bits

from nf4kernels import QuantizedExperts, dequantize, grouped_linear, linear, quantize, quantize_experts

ops = torch.ops.nf4kernels
# Rows of each expert: none at either end and between, fewer and more than linear takes row by row, one expert with all.
COUNTS = ((0, 3, 1, 0, 17, 4, 0), (5, 2, 64), (0, 0, 40), (33, 0, 0), (9,), (0,), (0, 0, 0), (1,) * 12)
LAYOUTS = (
    Layout(),
    Layout(scale_codebook=None),
    Layout(32, "fp4", "dynamic8"),
    Layout(128, "custom", None),
    Layout(256, "int4"),
)
SHAPES = ((48, 256), (37, 512), (128, 256))


def experts_weight(E, N, K, dtype=torch.float32):
    """Experts of different sizes, so that a scale of another expert shows."""
    sizes = 2.0 ** torch.arange(E).remainder(5)
    return (torch.stack([cases.weight(N, K, seed=e) for e in range(E)]) * sizes[:, None, None]).to(dtype)


def experts(E, N, K, layout=Layout(), dtype=torch.bfloat16):
    """Made by the reference, expert by expert."""
    stacked = experts_weight(E, N, K)
    each = [
        cases.from_parts(*(cases.reference.quantize(w, layout.code, layout.block_size)), (N, K), layout, dtype)
        for w in stacked
    ]
    tensors = {
        name: None if getattr(each[0], name) is None else torch.stack([getattr(w, name) for w in each])
        for name in ("packed", "absmax", "scale_absmax", "scale_offset")
    }
    return QuantizedExperts(
        **tensors, code=each[0].code, scale_code=each[0].scale_code, shape=(E, N, K), dtype=dtype,
        block_size=layout.block_size, codebook=layout.codebook, scale_codebook=layout.scale_codebook,
    )  # fmt: skip


def offsets_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def spans(counts):
    """(expert, its rows) of every expert."""
    ends = offsets_of(counts).tolist()
    return [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts))]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_the_bits_of_linear_on_each_experts_rows(isa, shape, counts, dtype):
    N, K = shape
    qweights = experts(len(counts), N, K)
    x, dy = cases.activations(sum(counts), K, dtype), cases.activations(sum(counts), N, dtype, seed=1)
    y = ops.grouped_linear(x, offsets_of(counts), *qweights.op_args())
    dx = ops.grouped_linear_dgrad(dy, offsets_of(counts), *qweights.op_args())
    assert y.shape == (sum(counts), N)
    assert dx.shape == (sum(counts), K)
    for e, rows in spans(counts):
        weight = qweights[e].op_args()
        assert_same_bits(y[rows], ops.linear(x[rows], *weight, None), f"{isa} y of expert {e}")
        assert_same_bits(dx[rows], ops.linear_dgrad(dy[rows], *weight), f"{isa} dx of expert {e}")
