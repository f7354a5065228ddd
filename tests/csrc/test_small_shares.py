"""csrc/cuda/linear_small.cu: how thread blocks share tiles, and join the parts of those that are cut between them.

A share is some units of 32 or 64 n by 128 k, in order through W. The bits must not depend on who comes last, nor on
whether the last one adds the parts up or a second launch does.
"""

import ctypes
import itertools

import pytest
import torch
from executor.executor import SM_86_SHARED, SM_90_SHARED
from support import cases
from support.cases import Layout
from support.numerics import assert_product_within_bound, assert_same_bits

SLOTS = 256  # of arrival counters, csrc/cuda/arrivals.h
# N, K, multiprocessors, and into how many parts tiles are then cut: a share may end anywhere, also within a tile that
# it begins in; the last tile has rows past N, and the last unit of a row may have 64 k.
CUTS = [
    (200, 1216, 3, {1: {1, 2}, 11: {1, 2}}),
    (200, 1216, 5, {1: {1, 2}, 11: {2}}),
    (130, 4096, 5, {1: {1}, 11: {2, 3}}),
    (64, 4096, 3, {1: {2}, 11: {3}}),
    (30, 4096, 4, {1: {4}, 11: {4}}),
    (128, 2048, 2, {1: {1}, 11: {1}}),
    (40, 5120, 1, {1: {1}, 11: {1}}),
]


@pytest.fixture
def small(executor_ops):
    """linear by linear_small alone, on a device of so many multiprocessors."""
    library = executor_ops.executor.library
    library.nf4kernels_executor_stream.argtypes = [ctypes.c_uint64] * 2
    library.nf4kernels_executor_forget_streams()
    yield executor_ops
    library.nf4kernels_executor_forget_streams()


def run(small, x, qweight, bias=None, lora=(None, None), scaling=1.0):
    small.executor.reset()
    with small.running("small"):
        return small.run("linear", x, *qweight.op_args(), bias, *lora, scaling)


def parts(M, N, K, blocks):
    """Of each tile."""
    depth = -(-K // 128)
    units = -(-N // (32 if M <= 8 else 64)) * depth
    begins = [units * block // blocks for block in range(blocks + 1)]
    owners = [block for block in range(blocks) for _ in range(begins[block], begins[block + 1])]
    return [len(set(owners[first : first + depth])) for first in range(0, units, depth)]


@pytest.mark.parametrize("shared", [SM_86_SHARED, SM_90_SHARED], ids=["99 KB", "227 KB"])
@pytest.mark.parametrize("layout", [Layout(), Layout(32), Layout(256, scale_codebook=None)], ids=str)
@pytest.mark.parametrize(("N", "K", "multiprocessors", "cuts"), CUTS)
def test_cut_tiles_are_joined_in_order(small, N, K, multiprocessors, cuts, layout, shared):
    qweight = cases.quantized(N, K, layout)
    small.pretend(90, multiprocessors)
    for M, dtype in ((1, torch.bfloat16), (11, torch.float16)):
        assert set(parts(M, N, K, multiprocessors)) == cuts[M]
        x, bias = cases.activations(M, K, dtype, 1.0), torch.randn(N).to(dtype)
        B, P = cases.activations(N, 5, dtype, seed=4), cases.activations(M, 5, dtype, seed=3)
        small.executor.set(shared_limit=shared)
        y = run(small, x, qweight, bias, (P, B), 1.75)
        joined = torch.cat([x, P], 1), torch.cat([cases.dense(qweight).T, 1.75 * B.T.float()], 0)
        assert_product_within_bound(y, *joined, f"{N} {K} M={M}", bias)
        (launch,) = small.launches()
        assert (launch.grid[0], launch.count) == (multiprocessors, 1)
        for schedule, seed in (("descending", 0), ("random", 1), ("random", 2), ("random", 3)):
            small.executor.set(schedule, seed=seed, shared_limit=shared)
            assert_same_bits(run(small, x, qweight, bias, (P, B), 1.75), y, f"{schedule} {seed}")
        small.executor.set(copies="early", shared_limit=shared)
        assert_same_bits(run(small, x, qweight, bias, (P, B), 1.75), y, "early copies")


@pytest.mark.parametrize("M", [1, 16])
def test_without_counters_a_second_launch_joins(small, M):
    """Once every slot is taken, a new stream gets the same bits by two launches, and only where it must."""
    library = small.executor.library
    cut, whole = cases.quantized(130, 4096), cases.quantized(128, 2048)
    small.pretend(90, 2)
    x = {qweight: cases.activations(M, qweight.shape[1], torch.bfloat16) for qweight in (cut, whole)}
    by_one = {qweight: run(small, x[qweight], qweight) for qweight in (cut, whole)}
    slots = [library.nf4kernels_executor_stream(0, stream) for stream in range(1, SLOTS + 1)]
    assert slots[-1] == -1, "the stream 0 was first"
    assert_same_bits(run(small, x[cut], cut), by_one[cut], "by two launches")
    assert {launch.kernel.partition("<")[0] for launch in small.launches()} == {
        "linear_small_kernel",
        "linear_small_join_kernel",
    }
    assert_same_bits(run(small, x[whole], whole), by_one[whole], "no tile is cut")
    assert len(small.launches()) == 1
    library.nf4kernels_executor_stream(0, 1)
    assert_same_bits(run(small, x[cut], cut), by_one[cut], "a stream that came in time")
    assert len(small.launches()) == 1


def test_counters_return_to_zero(small):
    """One stream's launches share counters, whatever the shapes: each must find them as the first one did."""
    shapes = [(130, 4096, 5), (64, 4096, 3), (200, 1216, 5), (64, 4096, 4)]
    first = {}
    for N, K, multiprocessors in itertools.chain(*itertools.permutations(shapes, 2)):
        small.pretend(90, multiprocessors)
        y = run(small, cases.activations(2, K, torch.bfloat16), cases.quantized(N, K))
        assert_same_bits(y, first.setdefault((N, K), y), f"{N} {K}")


def test_no_running_sum_is_longer_than_512_products(small):
    """2^29 swallows every 16 k that the same sum adds to it, and -2^29 in another warp too: no more than 512 each."""
    N, K = 8, 40000
    small.pretend(90, 1)
    qweight = cases.quantized(N, K, Layout(32, scale_codebook=None))
    qweight = cases.with_tensors(
        qweight, packed=torch.full_like(qweight.packed, 0xFF), absmax=torch.ones_like(qweight.absmax)
    )
    x = torch.ones(9, K)
    x[:, 0], x[:, 128] = 2.0**29, -(2.0**29)  # two warps of the four
    y = run(small, x.bfloat16(), qweight).float()
    lost = K - y
    assert (lost <= 2 * 512 * 16 + 0.01 * K).all(), lost
    assert 2 * K / 4 > 2 * 512 * 16 + 0.02 * K, "without a second sum all of two warps' k would be lost"
