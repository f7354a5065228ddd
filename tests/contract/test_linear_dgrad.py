"""linear_dgrad: DESIGN section 7's bound for every row, determinism and independence, at every instruction set."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, EMPTY_SHAPES, LAYOUTS, ROWS, SHAPES, Layout, dtype_id, shape_id
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased


def dgrad(dy, qweight):
    return torch.ops.nf4kernels.linear_dgrad(dy, *qweight.op_args())


def assert_dgrad_within_bound(dy, qweight, what):
    assert_product_within_bound(dgrad(dy, qweight), dy, cases.dense(qweight), f"linear_dgrad {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_shape(isa, shape, dtype):
    N, K = shape
    qweight = cases.quantized(N, K)
    for M in ROWS:
        assert_dgrad_within_bound(cases.activations(M, N, dtype), qweight, f"{isa} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(isa, layout, dtype):
    for N, K in ((64, 96), (37, 100), (33, 65), (33, 192), (40, 4096)):
        qweight = cases.quantized(N, K, layout)
        for M in (1, 4, 17):
            assert_dgrad_within_bound(cases.activations(M, N, dtype), qweight, f"{isa} {layout} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mean", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom"])
def test_long_contraction_and_dy_with_a_mean(isa, codebook, mean, dtype):
    for scale_codebook in ("e4m3", None):
        qweight = cases.quantized(4096, 64, Layout(64, codebook, scale_codebook))
        for M in (1, 3, 16, 33):
            dy = cases.activations(M, 4096, dtype, mean)
            assert_dgrad_within_bound(dy, qweight, f"{isa} {codebook} {scale_codebook} mean {mean} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(64, 16384 + 64), (33000, 40), (5, 40000 - 1)], ids=shape_id)
def test_very_long_rows(isa, shape, dtype):
    for block_size in (64, 4096):
        qweight = cases.quantized(*shape, Layout(block_size))
        for M in (1, 5):
            assert_dgrad_within_bound(cases.activations(M, shape[0], dtype, 1.0), qweight, f"{isa} {block_size} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [511, 512, 513, 1100])
def test_many_rows(isa, M, dtype):
    """A kernel takes so many rows at a time; the rest is another pass."""
    for K in (70, 192):
        assert_dgrad_within_bound(cases.activations(M, 97, dtype), cases.quantized(97, K), f"{isa} {K} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1088, 64), (100, 37)], ids=shape_id)
def test_uneven_scales(isa, shape, dtype):
    qweight = cases.uneven(*shape)
    for M in (1, 4, 7, 16, 33):
        assert_dgrad_within_bound(cases.activations(M, shape[0], dtype, 1.0), qweight, f"{isa} M={M}")


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_empty_weight(isa, shape, dtype):
    N, K = shape
    qweight = cases.quantized(N, K)
    for M in (0, 1, 7):
        assert torch.equal(dgrad(torch.ones(M, N, dtype=dtype), qweight), torch.zeros(M, K, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_leading_dimensions(isa, dtype):
    qweight = cases.quantized(37, 100)
    flat = cases.activations(24, 37, dtype)
    expected = dgrad(flat, qweight)
    for shape in ((2, 3, 4), (24, 1), (1, 24), (2, 1, 3, 4)):
        assert torch.equal(dgrad(flat.view(*shape, 37), qweight), expected.view(*shape, 100))
    assert torch.equal(dgrad(flat[5], qweight), dgrad(flat[5:6], qweight)[0])
    for shape in ((0,), (0, 3), (2, 0, 4)):
        assert dgrad(torch.empty(*shape, 37, dtype=dtype), qweight).shape == (*shape, 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_non_contiguous_dy(isa, dtype):
    """dy often comes expanded (from sum) or transposed (from attention)."""
    qweight = cases.quantized(37, 100)
    base = cases.activations(40, 301, dtype)
    for name, dy in {
        "columns": base[:, 1:38],
        "every-other-column": base[:, 1:75:2],
        "column-major": base[:, :37].T.contiguous().T,
        "expanded-scalar": base[0, 0].expand(9, 37),
        "expanded-row": base[:1, 3:40].expand(9, 37),
    }.items():
        assert_same_bits(dgrad(dy, qweight), dgrad(dy.clone(memory_format=torch.contiguous_format), qweight), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dy_at_any_address(isa, dtype):
    if isa == "reference":
        pytest.skip("the reference multiplies by torch, whose bits depend on the alignment of dy")
    qweight = cases.quantized(37, 100)
    base = cases.activations(40, 37, dtype)
    for start in (1, 2, 5):
        dy = base.view(-1)[start : start + 333].view(9, 37)
        assert_same_bits(dgrad(dy, qweight), dgrad(dy.clone(), qweight), f"linear_dgrad {isa} offset {start}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(512, 256), (37, 100), (33, 65)], ids=shape_id)
@pytest.mark.parametrize("M", [1, 2, 5, 16, 33, 129])
def test_threads_and_repetition_do_not_change_bits(isa, M, shape, dtype):
    if isa == "reference":
        pytest.skip("the reference multiplies by torch, whose bits depend on the number of threads")
    qweight = cases.quantized(*shape)
    dy = cases.activations(M, shape[0], dtype)
    torch.set_num_threads(1)
    one = dgrad(dy, qweight)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert_same_bits(dgrad(dy, qweight), one, f"linear_dgrad {isa} M={M} with {threads} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(320, 48), (33, 65)], ids=shape_id)
@pytest.mark.parametrize("M", [2, 3, 4, 7, 13, 17, 64])
def test_a_row_does_not_see_the_others(isa, M, shape, dtype):
    qweight = cases.quantized(*shape)
    dy = cases.activations(M, shape[0], dtype)
    alone = dgrad(dy, qweight)
    for row in {0, M // 2, M - 1}:
        for name, value in (("NaN", torch.nan), ("inf", torch.inf), ("zero", 0.0), ("large", 1e4)):
            other = torch.full_like(dy, value)
            other[row] = dy[row]
            assert_same_bits(dgrad(other, qweight)[row], alone[row], f"linear_dgrad {isa} M={M} row {row} by {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("K", [320, 100])
def test_nan_block_reaches_its_columns_only(isa, K, dtype):
    qweight = cases.quantized(40, K, Layout(scale_codebook=None))
    qweight.absmax.view(-1)[7] = torch.nan
    hit = (torch.arange(40 * K) // 64 == 7).view(40, K).any(0)
    for M in (1, 3, 17):
        dx = dgrad(cases.activations(M, 40, dtype), qweight)
        assert dx[:, hit].isnan().all()
        assert dx[:, ~hit].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [1, 4, 17])
def test_one_hot_dy_reads_the_weight(isa, M, dtype):
    N, K = 37, 200
    for layout in (Layout(), Layout(32, "custom", None)):
        qweight = cases.random_bytes(N, K, layout)
        w = cases.dense(qweight).double()
        for row in (0, 1, 15, 16, 36):
            dy = torch.zeros(M, N, dtype=dtype)
            dy[M - 1, row] = 1
            dx = dgrad(dy, qweight)
            # One rounding of the output, and at most two of the weight (its level and its scale), half an eps each.
            allowed = 1.5 * torch.finfo(dtype).eps * w[row].abs()
            assert ((dx[M - 1].double() - w[row]).abs() <= allowed).all(), (isa, row, layout)
            assert (dx[: M - 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom"])
def test_unbiased(isa, codebook, dtype):
    qweight = cases.quantized(512, 512, Layout(codebook=codebook))
    for M in (4, 64):
        for mean in (0.0, 1.0):
            dy = cases.activations(M, 512, dtype, mean)
            assert_unbiased(dgrad(dy, qweight), dy, cases.dense(qweight), f"linear_dgrad {isa} {codebook} M={M}")


def test_fp32_is_true_fp32(isa):
    qweight = cases.quantized(1024, 64)
    w = cases.dense(qweight).double()
    for M in (1, 2, 16, 64):
        dy = cases.activations(M, 1024, torch.float32)
        error = (dgrad(dy, qweight).double() - dy.double() @ w).abs()
        assert (error <= 2.0**-20 * (dy.double().abs() @ w.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_is_the_transpose_of_linear(isa, dtype):
    """<linear(x), dy> = <x, dgrad(dy)> up to rounding: forward and backward see one weight."""
    qweight = cases.random_bytes(50, 130)
    x, dy = cases.activations(9, 130, dtype), cases.activations(9, 50, dtype, seed=1)
    y = torch.ops.nf4kernels.linear(x, *qweight.op_args(), None)
    forward = (y.double() * dy.double()).sum()
    backward = (x.double() * dgrad(dy, qweight).double()).sum()
    magnitude = (x.double().abs() @ cases.dense(qweight).double().abs().T * dy.double().abs()).sum()
    # Per term: the output's rounding and at most two of the weight, on either side; the sums in fp32 are below them.
    assert (forward - backward).abs() <= 3 * torch.finfo(dtype).eps * magnitude
