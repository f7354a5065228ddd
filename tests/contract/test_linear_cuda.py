"""linear on CUDA: every kernel forced in turn, on the host executor and on a GPU, held to what the CPU's are."""

import pytest
import torch
from support import cases
from support.cases import DEFAULT, DTYPES, LAYOUTS, Layout, dtype_id, paired, shape_id
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased

HALVES = (torch.bfloat16, torch.float16)
KERNELS = ("small", "tiled", "dequantize_gemm", "any")
# Rows of x around the tiles: 8 and 16 of small, 32, 64 and 128 of tiled.
ROWS = {
    "small": (1, 2, 7, 8, 9, 16),
    "tiled": (1, 17, 32, 33, 65, 128, 130),
    "dequantize_gemm": (1, 65),
    "any": (1, 3, 64, 65),
}
# (N, K) that tensor cores take, around the tiles: 32, 64 and 128 rows of W; one to many blocks of 64.
SHAPES = ((1, 64), (33, 128), (64, 192), (31, 320), (100, 576), (136, 1088), (257, 64))
ODD_SHAPES = ((1, 1), (3, 5), (17, 32), (5, 63), (33, 65), (37, 100), (129, 31), (19, 2080))


def linear(cuda_ops, x, qweight, bias=None, P=None, B=None, scaling=1.0):
    moved = cuda_ops.move((x, *qweight.op_args(), bias, P, B))
    return cuda_ops.ops.linear(*moved, scaling).cpu()


def assert_within_bound(cuda_ops, x, qweight, what, bias=None):
    y = linear(cuda_ops, x, qweight, bias)
    assert_product_within_bound(y, x, cases.dense(qweight).T, f"linear {what}", bias)


def assert_ran(cuda_ops, kernel):
    """The kernel that was forced is the one that ran; a GPU keeps no list, and an obstacle is an error there too."""
    launches = cuda_ops.launches()
    if launches is None:
        return
    name = {"small": "linear_small", "tiled": "linear_tiled", "dequantize_gemm": "dequantize", "any": "product_any"}[
        kernel
    ]
    products = {n for n in ("linear_small", "linear_tiled", "product_any") for run in launches if n in run.kernel}
    assert any(name in run.kernel for run in launches), launches
    assert products <= {name}, launches


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_and_shape(cuda_ops, kernel, shape, dtype):
    N, K = shape
    qweight = cases.quantized(N, K)
    bias = torch.randn(N).to(dtype)
    with cuda_ops.running(kernel):
        for M in ROWS[kernel]:
            x = cases.activations(M, K, dtype, 1.0)
            assert_within_bound(cuda_ops, x, qweight, f"{kernel} M={M}")
            assert_within_bound(cuda_ops, x, qweight, f"{kernel} M={M} bias", bias)
    assert_ran(cuda_ops, kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=shape_id)
def test_shapes_without_a_tensor_core_kernel(cuda_ops, shape, dtype):
    N, K = shape
    qweight = cases.quantized(N, K)
    for M in (1, 5, 66):
        x = cases.activations(M, K, dtype)
        assert_within_bound(cuda_ops, x, qweight, f"M={M}", torch.randn(N).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "layout"), paired(((37, 320), (96, 256), (64, 576)), LAYOUTS), ids=str)
def test_every_layout(cuda_ops, shape, layout, dtype):
    qweight = cases.quantized(*shape, layout)
    for M in (1, 12, 40):
        assert_within_bound(cuda_ops, cases.activations(M, shape[1], dtype), qweight, f"{layout} M={M}")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom"])
@pytest.mark.parametrize("kernel", ["small", "tiled"])
def test_long_contraction_and_x_with_a_mean(cuda_ops, kernel, codebook, dtype):
    """A level rounded the same way everywhere adds up under a mean."""
    qweight = cases.quantized(64, 4096, Layout(64, codebook))
    x = cases.activations(16, 4096, dtype, 1.0)
    with cuda_ops.running(kernel):
        assert_within_bound(cuda_ops, x, qweight, f"{kernel} {codebook}")
        y = linear(cuda_ops, x, qweight)
    # How often a level is rounded up keeps the slope of a codebook, not of one matrix, within the test's deviations.
    if codebook in ("nf4", "int4", "af4"):
        assert_unbiased(y, x, cases.dense(qweight).T, f"{kernel} {codebook}")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_far_apart(cuda_ops, kernel, dtype):
    for qweight in (cases.uneven(40, 512), cases.uneven(40, 512, zeros=False)):
        with cuda_ops.running(kernel):
            assert_within_bound(cuda_ops, cases.activations(9, 512, dtype), qweight, kernel)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rank", [1, 5, 8, 16, 40])
def test_low_rank_term(cuda_ops, rank, kernel, dtype):
    N, K, scaling = 72, 192, 2.5
    qweight = cases.quantized(N, K)
    B = (torch.randn(N, rank) / rank).to(dtype)
    bias = torch.randn(N).to(dtype)
    with cuda_ops.running(kernel):
        for M in ROWS[kernel][1:4]:
            x, P = cases.activations(M, K, dtype), cases.activations(M, rank, dtype, seed=1)
            y = linear(cuda_ops, x, qweight, bias, P, B, scaling)
            both, matrix = torch.cat([x, P], 1), torch.cat([cases.dense(qweight).T, scaling * B.float().T])
            assert_product_within_bound(y, both, matrix, f"linear {kernel} M={M} rank {rank}", bias)


@pytest.mark.parametrize("kernel", ["small", "tiled"])
def test_splits_of_the_contraction(executor_ops, kernel):
    """More multiprocessors, more parts; every part and the way they are added up is deterministic."""
    qweight, M = cases.quantized(40, 4096), 12
    x, P, B = (cases.activations(rows, columns, torch.bfloat16) for rows, columns in ((M, 4096), (M, 6), (40, 6)))
    matrix = torch.cat([cases.dense(qweight).T, B.float().T])
    bias = torch.randn(40).bfloat16()
    seen = set()
    for multiprocessors in (1, 2, 4):
        executor_ops.pretend(90, multiprocessors)
        executor_ops.executor.reset()
        with executor_ops.running(kernel):
            y = linear(executor_ops, x, qweight, bias, P, B)
            assert_same_bits(linear(executor_ops, x, qweight, bias, P, B), y, "again")
        assert_product_within_bound(y, torch.cat([x, P], 1), matrix, f"{kernel} {multiprocessors}", bias)
        (product,) = (run for run in executor_ops.launches() if "linear" in run.kernel)
        splits = product.grid[1] if kernel == "small" else product.grid[2]
        assert any("reduce" in run.kernel for run in executor_ops.launches()) == (splits > 1)
        seen.add(splits)
    assert len(seen) == 3, seen


@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_do_not_depend_on_the_order_of_threads(cuda_ops, kernel):
    qweight, M = cases.quantized(70, 320), ROWS[kernel][-1]
    x, P, B = (cases.activations(r, c, torch.bfloat16) for r, c in ((M, 320), (M, 8), (70, 8)))
    with cuda_ops.running(kernel):
        expected = linear(cuda_ops, x, qweight, None, P, B)
        for setting in cuda_ops.settings():
            assert_same_bits(linear(cuda_ops, x, qweight, None, P, B), expected, f"{kernel} {setting}")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_depends_on_no_other(cuda_ops, kernel, dtype):
    """Neither on NaN in another row of x, nor a column of y on a NaN scale in another row of W."""
    qweight = cases.quantized(40, 192, Layout(scale_codebook=None))
    x = cases.activations(9, 192, dtype)
    with cuda_ops.running(kernel):
        clean = linear(cuda_ops, x, qweight)
        x[4] = torch.nan
        y = linear(cuda_ops, x, qweight)
        assert y[4].isnan().all()
        keep = torch.arange(9) != 4
        assert_same_bits(y[keep], clean[keep], "other rows")
        x[4] = 0
        absmax = qweight.absmax.clone()
        absmax[33, 1] = torch.nan
        y = linear(cuda_ops, x, cases.with_tensors(qweight, absmax=absmax))
    assert y[:, 33].isnan().all()
    assert_same_bits(y[keep][:, :33], clean[keep][:, :33], "columns before")
    assert_same_bits(y[keep][:, 34:], clean[keep][:, 34:], "columns after")


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_outside_of_a_tensor_is_read(executor_ops, kernel, at_end):
    """Inputs end (or begin) at a page that may not be touched."""
    for N, K in ((33, 128), (64, 64)) + (((7, 37),) if kernel in ("any", "dequantize_gemm") else ()):
        qweight = cases.quantized(N, K)
        for M in ROWS[kernel][:3]:
            tensors = (
                cases.activations(M, K, torch.bfloat16), *qweight.op_args(), torch.randn(N).bfloat16(),
                cases.activations(M, 3, torch.bfloat16), cases.activations(N, 3, torch.bfloat16),
            )  # fmt: skip
            # A pointer of the tensor cores' kernels is aligned to 16 bytes, which the end of a page is for these.
            fenced = [
                guarded(a, at_end) if isinstance(a, torch.Tensor) and a.nbytes % (16 if kernel != "any" else 1) == 0
                else a for a in tensors
            ]  # fmt: skip
            with executor_ops.running(kernel):
                expected = executor_ops.ops.linear(*tensors, 2.0)
                assert_same_bits(executor_ops.ops.linear(*fenced, 2.0), expected, f"{kernel} {M}x{N}x{K}")


def test_the_choice_and_what_it_is_told(executor_ops):
    """fp32 and unaligned x go to kernels that take them; x of any strides and leading dimensions is taken."""
    qweight = cases.quantized(48, 128)
    buffer = cases.activations(1, 9 * 128 + 8, torch.bfloat16)[0]
    for x, kernel in (
        (buffer[: 9 * 128].view(9, 128), "linear_small"),
        (buffer[1 : 1 + 9 * 128].view(9, 128), "product_any"),
        (cases.activations(128, 9, torch.bfloat16).T, "linear_small"),
        (cases.activations(9, 128, torch.float32), "product_any"),
        (cases.activations(40, 128, torch.bfloat16), "linear_tiled"),
        (cases.activations(400, 128, torch.bfloat16), "dequantize"),
    ):
        executor_ops.executor.reset()
        assert_within_bound(executor_ops, x, qweight, kernel)
        assert any(kernel in run.kernel for run in executor_ops.launches()), (kernel, executor_ops.launches())
    x = cases.activations(6, 128, torch.bfloat16).view(2, 3, 128)
    assert linear(executor_ops, x, qweight).shape == (2, 3, 48)
    assert linear(executor_ops, x[0, 0], qweight).shape == (48,)


def test_empty(cuda_ops):
    for N, K in ((0, 64), (5, 0), (0, 0), (5, 64)):
        for M in (0, 3):
            x = torch.randn(M, K).bfloat16()
            bias = torch.randn(N).bfloat16()
            y = linear(cuda_ops, x, cases.quantized(N, K), bias)
            assert y.shape == (M, N)
            if K == 0:
                assert torch.equal(y, bias.expand(M, N))


@pytest.mark.parametrize(
    ("kernel", "x", "layout", "reason"),
    [
        ("small", torch.randn(17, 64).bfloat16(), DEFAULT, "at most 16 rows"),
        ("tiled", torch.randn(3, 64), DEFAULT, "true fp32"),
        ("tiled", torch.randn(3, 64).bfloat16(), Layout(32), "block_size at least 64"),
        ("small", torch.randn(3, 96).bfloat16(), DEFAULT, "K must be a multiple of 64"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_an_error(cuda_ops, kernel, x, layout, reason):
    with cuda_ops.running(kernel), pytest.raises(RuntimeError, match=f"forced kernel {kernel} cannot run.*{reason}"):
        linear(cuda_ops, x, cases.quantized(32, x.shape[1], layout))


def test_an_unknown_kernel_is_refused(cuda_ops):
    with pytest.raises(ValueError, match="any, small, tiled or dequantize_gemm, got fast"), cuda_ops.running("fast"):
        pass
