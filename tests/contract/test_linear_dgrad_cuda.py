"""linear_dgrad on CUDA: every kernel forced in turn, on the host executor and on a GPU, held to what the CPU's are."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, LAYOUTS, Layout, dtype_id, paired, shape_id
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased

HALVES = (torch.bfloat16, torch.float16)
KERNELS = ("tiled", "dequantize_gemm", "any")
# Rows of dY around the tiles: 16, 64 and 128 of tiled.
ROWS = {"tiled": (1, 15, 17, 64, 66, 130), "dequantize_gemm": (1, 65), "any": (1, 65)}
# (N, K) that tensor cores take, around the tiles: 128 and 256 columns, stages of 32, 64 and 128 rows of W.
SHAPES = ((8, 64), (24, 128), (136, 192), (64, 320), (200, 576))
ODD_SHAPES = ((1, 1), (3, 5), (17, 32), (5, 63), (33, 65), (37, 128), (129, 31))


def dgrad(cuda_ops, dy, qweight, Q=None, A=None, scaling=1.0):
    moved = cuda_ops.move((dy, *qweight.op_args(), Q, A))
    return cuda_ops.ops.linear_dgrad(*moved, scaling).cpu()


def assert_within_bound(cuda_ops, dy, qweight, what):
    assert_product_within_bound(dgrad(cuda_ops, dy, qweight), dy, cases.dense(qweight), f"dgrad {what}")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_and_shape(cuda_ops, kernel, shape, dtype):
    N, K = shape
    qweight = cases.quantized(N, K)
    with cuda_ops.running(kernel):
        for M in ROWS[kernel]:
            assert_within_bound(cuda_ops, cases.activations(M, N, dtype, 1.0), qweight, f"{kernel} M={M}")
    name = {"tiled": "linear_dgrad_tiled", "dequantize_gemm": "dequantize", "any": "product_any"}[kernel]
    assert cuda_ops.launches() is None or any(name in run.kernel for run in cuda_ops.launches())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=shape_id)
def test_shapes_without_a_tensor_core_kernel(cuda_ops, shape, dtype):
    qweight = cases.quantized(*shape)
    for M in (1, 5, 66):
        assert_within_bound(cuda_ops, cases.activations(M, shape[0], dtype), qweight, f"M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "layout"), paired(((40, 320), (96, 256), (64, 576)), LAYOUTS), ids=str)
def test_every_layout(cuda_ops, shape, layout, dtype):
    qweight = cases.quantized(*shape, layout)
    for M in (1, 20):
        assert_within_bound(cuda_ops, cases.activations(M, shape[0], dtype), qweight, f"{layout} M={M}")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom"])
def test_long_contraction_and_dy_with_a_mean(cuda_ops, codebook, dtype):
    qweight = cases.quantized(4096, 64, Layout(64, codebook))
    dy = cases.activations(16, 4096, dtype, 1.0)
    with cuda_ops.running("tiled"):
        assert_within_bound(cuda_ops, dy, qweight, codebook)
        if codebook == "nf4":
            assert_unbiased(dgrad(cuda_ops, dy, qweight), dy, cases.dense(qweight), codebook)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("codebook", ["nf4", "int4", "af4", "custom"])
@pytest.mark.parametrize("scales", ["one", "clamped"])
def test_blocks_that_share_a_scale(cuda_ops, scales, codebook, mean):
    """An error of the scale, or of its product with a level, is then the same in every row of W and adds up."""
    layout = Layout(64, codebook, None if scales == "one" else "e4m3")
    if scales == "one":
        qweight = cases.quantized(1024, 128, layout)
        qweight = cases.with_tensors(qweight, absmax=torch.full_like(qweight.absmax, 0.117))
    else:
        qweight = cases.quantized_from(cases.weight(1024, 128).clamp(-2, 2), layout)
    with cuda_ops.running("tiled"):
        assert_within_bound(
            cuda_ops, cases.activations(16, 1024, torch.bfloat16, mean), qweight, f"{codebook} {scales}"
        )


def test_scales_beyond_fp16_of_weights_within(cuda_ops):
    qweight = cases.quantized(64, 128, Layout(64, "custom", None))
    qweight = cases.with_tensors(
        qweight, code=qweight.code / 2.5, absmax=torch.full_like(qweight.absmax, 1e5)
    )  # |Ŵ| up to 40,000
    dy = cases.activations(5, 64, torch.float16) * 2**-7
    for kernel in KERNELS:
        with cuda_ops.running(kernel):
            assert_within_bound(cuda_ops, dy, qweight, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_low_rank_term_that_leaves_no_room_for_its_scaling(cuda_ops, kernel):
    """fp16: Q of a scaled loss near the dtype's end, times a scaling of 64, times an A that brings it back."""
    qweight, dy = cases.quantized(40, 128), cases.activations(20, 40, torch.float16)
    Q, A = 3000 * cases.activations(20, 8, torch.float16), 1e-3 * cases.activations(8, 128, torch.float16)
    with cuda_ops.running(kernel):
        dx = dgrad(cuda_ops, dy, qweight, Q, A, 64.0)
    matrix = torch.cat([cases.dense(qweight), 64 * A.float()])
    assert_product_within_bound(dx, torch.cat([dy, Q], 1), matrix, f"dgrad {kernel}")


def test_inputs_that_require_a_gradient(cuda_ops):
    """The op itself is not differentiable, and computes the same as without; by every kernel."""
    qweight, dy = cases.quantized(40, 64), cases.activations(5, 40, torch.bfloat16)
    Q, A = cases.activations(5, 8, torch.bfloat16), cases.activations(8, 64, torch.bfloat16)
    for kernel in KERNELS:
        with cuda_ops.running(kernel):
            expected = dgrad(cuda_ops, dy, qweight, Q, A)
            result = dgrad(cuda_ops, dy.clone().requires_grad_(), qweight, Q, A.clone().requires_grad_())
        assert_same_bits(result.detach(), expected, kernel)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rank", [1, 5, 8, 16, 40])
def test_low_rank_term(cuda_ops, rank, kernel, dtype):
    N, K, scaling = 72, 192, 2.5
    qweight = cases.quantized(N, K)
    A = (torch.randn(rank, K) / rank).to(dtype)
    with cuda_ops.running(kernel):
        for M in (3, 17, 70):
            dy, Q = cases.activations(M, N, dtype), cases.activations(M, rank, dtype, seed=1)
            dx = dgrad(cuda_ops, dy, qweight, Q, A, scaling)
            both, matrix = torch.cat([dy, Q], 1), torch.cat([cases.dense(qweight), scaling * A.float()])
            assert_product_within_bound(dx, both, matrix, f"dgrad {kernel} M={M} rank {rank}")


def test_splits_of_the_contraction(executor_ops):
    """More multiprocessors, more parts; every part and the way they are added up is deterministic."""
    N, M = 1024, 12
    qweight = cases.quantized(N, 128)
    dy, Q, A = (cases.activations(rows, columns, torch.bfloat16) for rows, columns in ((M, N), (M, 6), (6, 128)))
    matrix = torch.cat([cases.dense(qweight), A.float()])
    seen = set()
    for multiprocessors in (1, 2, 4):
        executor_ops.pretend(90, multiprocessors)
        executor_ops.executor.reset()
        with executor_ops.running("tiled"):
            dx = dgrad(executor_ops, dy, qweight, Q, A)
            assert_same_bits(dgrad(executor_ops, dy, qweight, Q, A), dx, "again")
        assert_product_within_bound(dx, torch.cat([dy, Q], 1), matrix, f"{multiprocessors} multiprocessors")
        (product,) = (run for run in executor_ops.launches() if "linear" in run.kernel)
        assert any("reduce" in run.kernel for run in executor_ops.launches()) == (product.grid[2] > 1)
        seen.add(product.grid[2])
    assert seen == {1, 2, 4}


@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_do_not_depend_on_the_order_of_threads(cuda_ops, kernel):
    qweight, M = cases.quantized(104, 320), ROWS[kernel][-1]
    dy, Q, A = (cases.activations(r, c, torch.bfloat16) for r, c in ((M, 104), (M, 8), (8, 320)))
    with cuda_ops.running(kernel):
        expected = dgrad(cuda_ops, dy, qweight, Q, A)
        for setting in cuda_ops.settings():
            assert_same_bits(dgrad(cuda_ops, dy, qweight, Q, A), expected, f"{kernel} {setting}")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_depends_on_no_other(cuda_ops, kernel, dtype):
    """Neither on NaN in another row of dY, nor 64 columns of dX on a NaN scale in other columns of W."""
    qweight = cases.quantized(40, 192, Layout(scale_codebook=None))
    dy = cases.activations(9, 40, dtype)
    keep = torch.arange(9) != 4
    with cuda_ops.running(kernel):
        clean = dgrad(cuda_ops, dy, qweight)
        dy[4] = torch.nan
        dx = dgrad(cuda_ops, dy, qweight)
        assert dx[4].isnan().all()
        assert_same_bits(dx[keep], clean[keep], "other rows")
        dy[4] = 0
        absmax = qweight.absmax.clone()
        absmax[33, 1] = torch.nan
        dx = dgrad(cuda_ops, dy, cases.with_tensors(qweight, absmax=absmax))
    assert dx[:, 64:128].isnan().all()
    assert_same_bits(dx[keep][:, :64], clean[keep][:, :64], "columns before")
    assert_same_bits(dx[keep][:, 128:], clean[keep][:, 128:], "columns after")


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_outside_of_a_tensor_is_read(executor_ops, kernel, at_end):
    """Inputs end (or begin) at a page that may not be touched."""
    for N, K in ((40, 128), (64, 64)) + (((7, 37),) if kernel in ("any", "dequantize_gemm") else ()):
        qweight = cases.quantized(N, K)
        for M in (1, 16, 70):
            tensors = (
                cases.activations(M, N, torch.bfloat16), *qweight.op_args(),
                cases.activations(M, 3, torch.bfloat16), cases.activations(3, K, torch.bfloat16),
            )  # fmt: skip
            # A pointer of the tensor cores' kernels is aligned to 16 bytes, which the end of a page is for these.
            fenced = [
                guarded(a, at_end) if isinstance(a, torch.Tensor) and a.nbytes % (16 if kernel != "any" else 1) == 0
                else a for a in tensors
            ]  # fmt: skip
            with executor_ops.running(kernel):
                expected = executor_ops.ops.linear_dgrad(*tensors, 2.0)
                assert_same_bits(executor_ops.ops.linear_dgrad(*fenced, 2.0), expected, f"{kernel} {M}x{N}x{K}")


def test_empty(cuda_ops):
    for N, K in ((0, 64), (5, 0), (0, 0), (8, 64)):
        for M in (0, 3):
            dx = dgrad(cuda_ops, torch.randn(M, N).bfloat16(), cases.quantized(N, K))
            assert dx.shape == (M, K)
            if N == 0:
                assert not dx.any()


def test_a_forced_kernel_that_cannot_run_is_an_error(cuda_ops):
    for N, dtype, kernel, reason in (
        (37, torch.bfloat16, "tiled", "N a multiple of 8"),
        (40, torch.bfloat16, "small", "the small kernel is linear's"),
        (40, torch.float32, "dequantize_gemm", "true fp32"),
    ):
        with (
            cuda_ops.running(kernel),
            pytest.raises(RuntimeError, match=f"forced kernel {kernel} cannot run.*{reason}"),
        ):
            dgrad(cuda_ops, cases.activations(3, N, dtype), cases.quantized(N, 64))
