"""grouped_linear and its gradient on CUDA: every kernel forced in turn, on the host executor and on a GPU."""

import cases
import pytest
import torch
from cases import DTYPES, Layout, dtype_id
from guarded import guarded
from numerics import assert_product_within_bound, assert_same_bits
from test_grouped_linear import offsets_of, rows_of

HALVES = (torch.bfloat16, torch.float16)
LINEAR, DGRAD = "grouped_linear", "grouped_linear_dgrad"
KERNELS = ((LINEAR, "small"), (LINEAR, "tiled"), (LINEAR, "any"), (DGRAD, "tiled"), (DGRAD, "any"))
# Rows of each expert: none first, in the middle and last; all in one; one expert; a full tile, one row more, one less.
COUNTS = ((0, 3, 0, 17, 8, 0), (0, 0, 40), (9,), (16, 33, 15), (130, 0, 70), (0, 0))
LAYOUTS = (Layout(scale_codebook=None), Layout(32, "fp4", "dynamic8"), Layout(128, "custom", None), Layout(256, "int4"))


def call(cuda_ops, op, x, offsets, qweights):
    """On the device, without gradients; `offsets` is a tensor or the counts that it is made of."""
    offsets = offsets if isinstance(offsets, torch.Tensor) else offsets_of(offsets)
    return getattr(cuda_ops.ops, op)(*cuda_ops.move((x, offsets, *qweights.op_args()))).cpu()


def activations(op, rows, qweights, dtype, mean=0.0):
    _, N, K = qweights.shape
    return cases.activations(rows, K if op == LINEAR else N, dtype, mean)


def assert_right(y, op, x, counts, qweights, what):
    """Every expert's rows within DESIGN section 7's bound, and zeros after them."""
    for expert, rows in rows_of(counts):
        w = cases.dense(qweights[expert])
        assert_product_within_bound(y[rows], x[rows], w.T if op == LINEAR else w, f"{op} {what} expert {expert}")
    assert torch.equal(y[sum(counts) :], torch.zeros_like(y[sum(counts) :]))


def assert_ran(cuda_ops, op, kernel):
    """The kernel that was forced is the one that ran; a GPU keeps no list, and an obstacle is an error there too."""
    launches = cuda_ops.launches()
    assert launches is None or {run.kernel.partition("<")[0] for run in launches} == {f"{op}_{kernel}_kernel"}


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_every_kernel(cuda_ops, op, kernel, counts, dtype):
    qweights = cases.quantized_experts(len(counts), 136, 192)
    for unused in (0, 5):
        x = activations(op, sum(counts) + unused, qweights, dtype, 1.0)
        with cuda_ops.running(kernel):
            assert_right(call(cuda_ops, op, x, counts, qweights), op, x, counts, qweights, kernel)
    assert_ran(cuda_ops, op, kernel)
