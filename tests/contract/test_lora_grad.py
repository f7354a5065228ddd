"""lora_grad: scaling * small.T @ wide, summed in fp32 and rounded once to the dtype that is asked for."""

import ctypes
import itertools
import math

import pytest
import torch
from executor.executor import SCHEDULES, SM_86_SHARED
from support import cases
from support.cases import DTYPES, dtype_id, shape_id
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits

SCALING = 1.75
# M, r, C: one element; tails of every tile, of runs of 64 rows, of the 16 rows of a mma and its 8 warps, of 8, 16 and
# 32 ranks, of 64 columns; C % 8 != 0, which has no tensor-core kernel; more rows than Triton has in one part.
CPU_SHAPES = (
    (1, 1, 1), (2, 3, 5), (3, 16, 33), (5, 4, 64), (17, 1, 100), (63, 5, 31), (64, 8, 48), (65, 16, 130),
    (130, 70, 40), (700, 16, 64),
)  # fmt: skip
CUDA_SHAPES = (
    (1, 1, 8),
    (5, 4, 64),
    (17, 8, 72),
    (130, 16, 136),
    (300, 17, 40),
    (64, 70, 128),
    (2, 3, 5),
    (65, 16, 33),
    (600, 4, 72),  # split
)
TRITON_SHAPES = ((1, 1, 8), (17, 8, 72), (600, 17, 40), (64, 70, 128), (1100, 3, 5))


def shapes(way):
    return CPU_SHAPES if way.is_compiled else CUDA_SHAPES if way.name in ("executor", "cuda") else TRITON_SHAPES


def inputs(M, r, C, dtype, mean=0.0):
    return cases.activations(M, r, dtype, mean, seed=1), cases.activations(M, C, dtype, mean, seed=2)


def lora_grad(way, small, wide, dtype, transposed=False):
    return way.run("lora_grad", small, wide, SCALING, dtype, transposed)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_every_shape(way, dtype, mean):
    for shape in shapes(way):
        small, wide = inputs(*shape, dtype, mean)
        actual = lora_grad(way, small, wide, dtype)
        assert_product_within_bound(actual, small.T.contiguous(), SCALING * wide.float(), f"lora_grad {way} {shape}")
        transposed = lora_grad(way, small, wide, dtype, True)
        assert transposed.is_contiguous()
        assert_same_bits(transposed, actual.T, f"{way} transposed")
        if way.name == "executor":
            tensor_cores = dtype != torch.float32 and shape[2] % 8 == 0
            assert any(("any" in name) != tensor_cores for name in way.kernel_names() if "lora_grad" in name)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_is_rounded_once_to_the_dtype_asked_for(way, dtype):
    """An fp32 adapter's gradient has fp32's error, also of bf16 inputs: 2^-20 of |small|·|wide| and no more.

    A tensor core drops what is below 2^-23 of its largest term, at every step.
    """
    for shape in shapes(way):
        small, wide = inputs(*shape, dtype)
        full = lora_grad(way, small, wide, torch.float32)
        exact = SCALING * small.double().T @ wide.double()
        magnitude = SCALING * small.double().abs().T @ wide.double().abs()
        steps = math.ceil(shape[0] / 16) + 8 if dtype != torch.float32 else shape[0]
        allowed = 2.0**-20 if way.is_compiled else (steps + 2) * 2.0**-22
        assert ((full.double() - exact).abs() <= allowed * magnitude).all()
        for out_dtype in DTYPES:
            assert_same_bits(lora_grad(way, small, wide, out_dtype), full.to(out_dtype), f"lora_grad {way}")


@pytest.mark.ways("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_more_rows_than_one_running_sum_may_have(way, dtype):
    """512 runs of 64 rows, then a second block of them."""
    if way.is_reference:
        pytest.skip("the reference multiplies by torch, whose sums are as long as it likes")
    small, wide = inputs(32768 + 70, 3, 5, dtype, 1.0)
    actual = way.run("lora_grad", small, wide, 1.0, torch.float32).double()
    exact = small.double().T @ wide.double()
    # Sums of at most 512 terms three deep, 2^-24 each in the worst case, and much less in fact.
    assert ((actual - exact).abs() <= 2.0**-18 * (small.double().abs().T @ wide.double().abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0, 4, 33), (0, 3, 8), (3, 0, 33), (3, 4, 0), (0, 0, 0)], ids=shape_id)
def test_empty(way, shape, dtype):
    M, r, C = shape
    for transposed in (False, True):
        actual = lora_grad(way, *inputs(M, r, C, dtype), dtype, transposed)
        assert torch.equal(actual, torch.zeros((C, r) if transposed else (r, C), dtype=dtype))


@pytest.mark.parametrize("C", [37, 40])
def test_leading_dimensions_and_strides(way, C):
    small, wide = inputs(24, 4, C, torch.bfloat16)
    expected = lora_grad(way, small, wide, torch.float32)
    for shape in ((2, 3, 4), (24, 1), (1, 24), (2, 12)):
        actual = lora_grad(way, small.view(*shape, 4), wide.view(*shape, C), torch.float32)
        assert_same_bits(actual, expected, f"lora_grad {way} {shape}")
    one = lora_grad(way, small[0], wide[0], torch.float32)
    assert_same_bits(one, lora_grad(way, small[:1], wide[:1], torch.float32), "no leading dimension")
    for strided in (wide[:1].expand(24, C), wide.T.contiguous().T, torch.cat([wide, wide], 1)[:, C:]):
        plain = lora_grad(way, small, strided.contiguous(), torch.float32)
        actual = lora_grad(way, small, strided, torch.float32)
        if way.name in ("executor", "cuda"):  # its address may choose another kernel
            assert ((actual - plain).abs() <= 2.0**-18 * plain.abs().max()).all()
        else:
            assert_same_bits(actual, plain, f"lora_grad {way} strides")


def test_wide_at_any_address(way):
    """A CUDA kernel of the tensor cores takes aligned pointers; another kernel has another order of sums."""
    small, wide = inputs(24, 4, 40, torch.bfloat16)
    expected = lora_grad(way, small, wide, torch.float32)
    moved = torch.empty(1 + wide.numel(), dtype=wide.dtype)[1:].view_as(wide).copy_(wide)
    assert ((lora_grad(way, small, moved, torch.float32) - expected).abs() <= 2.0**-18 * expected.abs().max()).all()


def test_bits_depend_on_no_schedule(way):
    for shape in way.pick(((1, 16, 2000), (16, 16, 2000), (200, 16, 2000)), ((300, 17, 136), (65, 16, 33))):
        for dtype in way.pick(DTYPES, (torch.bfloat16,)):
            small, wide = inputs(*shape, dtype)
            first = lora_grad(way, small, wide, dtype)
            for schedule in way.schedules():
                assert_same_bits(lora_grad(way, small, wide, dtype), first, f"lora_grad {way} {schedule}")


@pytest.mark.ways("executor")
def test_the_last_block_adds_the_splits_as_a_second_launch_would(way):
    """A stream that gets no arrival counters takes the second launch."""
    library = way.executor.library
    library.nf4kernels_executor_stream.argtypes = [ctypes.c_uint64] * 2
    for r, transposed in itertools.product((4, 7, 18), (False, True)):
        small, wide = inputs(600, r, 136, torch.bfloat16)
        results = []
        for streams in (0, 300):
            library.nf4kernels_executor_forget_streams()
            for stream in range(1, streams):
                library.nf4kernels_executor_stream(0, stream)
            way.executor.reset()
            for schedule in SCHEDULES:
                way.executor.set(schedule, shared_limit=SM_86_SHARED)
                results.append(lora_grad(way, small, wide, torch.bfloat16, transposed))
            assert any(name.startswith("reduce_splits") for name in way.kernel_names()) == (streams > 0)
        library.nf4kernels_executor_forget_streams()
        for other in results[1:]:
            assert_same_bits(other, results[0], f"lora_grad r={r}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [5, 66])
def test_nan_reaches_its_row_or_column_only(way, M, dtype):
    """And every other element keeps its bits."""
    small, wide = inputs(M, 6, 70, dtype)
    clean = lora_grad(way, small, wide, dtype)
    for row, column in ((0, 0), (M - 1, 69), (M // 2, 33)):
        for name, hit in (("wide", (slice(None), column)), ("small", (column % 6, slice(None)))):
            poisoned = {"small": small.clone(), "wide": wide.clone()}
            poisoned[name][row, column if name == "wide" else column % 6] = torch.nan
            grad, struck = lora_grad(way, **poisoned, dtype=dtype), torch.zeros(6, 70, dtype=torch.bool)
            struck[hit] = True
            assert grad[struck].isnan().all()
            assert_same_bits(grad[~struck], clean[~struck], f"lora_grad {way} {name}")


# What one way alone has.


def test_splits_of_the_depth(executor_ops):
    """More multiprocessors, more parts."""
    small, wide = inputs(2048, 16, 64, torch.bfloat16)
    seen = set()
    for multiprocessors in (1, 2, 4):
        executor_ops.pretend(90, multiprocessors)
        executor_ops.executor.reset()
        actual = lora_grad(executor_ops, small, wide, torch.bfloat16)
        assert_product_within_bound(actual, small.T.contiguous(), SCALING * wide.float(), f"{multiprocessors}")
        (product,) = (run for run in executor_ops.launches() if "lora_grad" in run.kernel)
        seen.add(product.grid[1])
    assert seen == {2, 4, 8}


@pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
def test_nothing_outside_of_a_tensor_is_read(executor_ops, at_end):
    """Of the CPU's kernels test_memory.py says so."""
    for shape in ((17, 3, 72), (16, 16, 64), (7, 5, 9)):
        small, wide = inputs(*shape, torch.bfloat16)
        aligned = wide.nbytes % 16 == 0 or shape[2] % 8 != 0
        fenced = guarded(small, at_end), guarded(wide, at_end) if aligned else wide
        expected = executor_ops.ops.lora_grad(small, wide, 1.0, torch.float32)
        assert_same_bits(executor_ops.ops.lora_grad(*fenced, 1.0, torch.float32), expected, shape_id(shape))
