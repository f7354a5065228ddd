"""linear: DESIGN section 7's bound for every row, determinism and independence of rows, at every instruction set."""

import pytest
import torch
from support import cases
from support.cases import DEFAULT, DTYPES, EMPTY_SHAPES, LAYOUTS, ROWS, SHAPES, Layout, dtype_id, shape_id
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased

from nf4kernels import linear


def assert_linear_within_bound(x, qweight, bias, what):
    matrix = cases.dense(qweight).T
    assert_product_within_bound(linear(x, qweight, bias), x, matrix, f"linear {what}", bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_shape(isa, shape, dtype):
    N, K = shape
    qweight = cases.quantized(N, K)
    bias = torch.randn(N).to(dtype)
    for M in ROWS:
        x = cases.activations(M, K, dtype)
        assert_linear_within_bound(x, qweight, None, f"{isa} M={M}")
        assert_linear_within_bound(x, qweight, bias, f"{isa} M={M} bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(isa, layout, dtype):
    for N, K in ((64, 96), (37, 100), (33, 65), (33, 192), (40, 4096)):
        qweight = cases.quantized(N, K, layout)
        for M in (1, 4, 17):
            assert_linear_within_bound(cases.activations(M, K, dtype), qweight, None, f"{isa} {layout} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mean", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom"])
def test_long_contraction_and_x_with_a_mean(isa, codebook, mean, dtype):
    """A level rounded the same way everywhere adds up under a mean; a running sum over K loses bits."""
    for scale_codebook in ("e4m3", None):
        qweight = cases.quantized(64, 4096, Layout(64, codebook, scale_codebook))
        for M in (1, 3, 16, 33):
            x = cases.activations(M, 4096, dtype, mean)
            assert_linear_within_bound(x, qweight, None, f"{isa} {codebook} {scale_codebook} mean {mean} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("K", [16384 + 64, 33000, 40000 - 1])
def test_very_long_rows(isa, K, dtype):
    """More than one slice of partial sums; blocks within a row, across rows, and rows that share bytes."""
    for block_size in (64, 4096):
        qweight = cases.quantized(35, K, Layout(block_size))
        for M in (1, 4, 5):
            assert_linear_within_bound(cases.activations(M, K, dtype, 1.0), qweight, None, f"{isa} {block_size} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [511, 512, 513, 1100])
def test_many_rows(isa, M, dtype):
    """A kernel takes so many rows at a time; the rest is another pass."""
    for K in (97, 192):
        x = cases.activations(M, K, dtype)
        assert_linear_within_bound(x, cases.quantized(70, K), torch.randn(70).to(dtype), f"{isa} {K} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "descending"])
@pytest.mark.parametrize("shape", [(40, 1088), (64, 1152), (37, 100)], ids=shape_id)
def test_uneven_scales(isa, shape, zeros, dtype):
    qweight = cases.uneven(*shape, zeros)
    for M in (1, 4, 7, 16, 33):
        assert_linear_within_bound(cases.activations(M, shape[1], dtype, 1.0), qweight, None, f"{isa} M={M}")


def test_large_x_under_falling_scales(isa):
    """A sum kept in units of the last block's scale overflows if the scales fall too far: 2^-27 within four blocks."""
    qweight = cases.quantized(40, 256, Layout(scale_codebook=None))
    falling = 2.0 ** -(torch.arange(4) * 9.0).expand(40, 4)
    qweight = cases.with_tensors(qweight, absmax=qweight.absmax * falling)
    x = torch.zeros(8, 256)
    x[:, :64] = cases.activations(8, 64, torch.float32) * 1e30
    assert_linear_within_bound(x.bfloat16(), qweight, None, isa)


def test_more_codebooks_than_are_remembered(isa):
    """Each codebook's bf16 levels are searched once and kept; two that begin alike are not taken for each other."""
    generator = torch.Generator().manual_seed(5)
    for i in range(12):
        code = torch.rand(16, generator=generator).mul(2).sub(1).sort().values
        code[:4] = torch.tensor([-1, -0.9, -0.8, -0.75])
        qweight = cases.with_tensors(cases.random_bytes(40, 128), code=code.sort().values, codebook="custom")
        assert_linear_within_bound(cases.activations(7, 128, torch.bfloat16, 1.0), qweight, None, f"{isa} codebook {i}")


def test_a_level_that_is_nan_is_only_seen_where_it_is_used(isa):
    qweight = cases.quantized(40, 128, Layout(scale_codebook=None))
    packed = qweight.packed.clone()
    packed[(packed & 15) == 3] += 1
    packed[(packed >> 4) == 3] += 16
    x = cases.activations(8, 128, torch.bfloat16)
    code = qweight.code.clone()
    code[3] = torch.nan
    for M in (1, 8):
        assert linear(x[:M], cases.with_tensors(qweight, packed=packed, code=code)).isfinite().all()


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_empty_weight(isa, shape, dtype):
    N, K = shape
    qweight = cases.quantized(N, K)
    bias = torch.arange(N).to(dtype)
    for M in (0, 1, 7):
        x = torch.ones(M, K, dtype=dtype)
        assert torch.equal(linear(x, qweight), torch.zeros(M, N, dtype=dtype))
        assert torch.equal(linear(x, qweight, bias), bias.expand(M, N))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_leading_dimensions(isa, dtype):
    qweight = cases.quantized(37, 100)
    flat = cases.activations(24, 100, dtype)
    expected = linear(flat, qweight)
    for shape in ((2, 3, 4), (24, 1), (1, 24), (2, 1, 3, 4), (1, 1, 1, 24)):
        assert torch.equal(linear(flat.view(*shape, 100), qweight), expected.view(*shape, 37))
    assert torch.equal(linear(flat[5], qweight), linear(flat[5:6], qweight)[0])
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 4)):
        assert linear(torch.empty(*shape, 100, dtype=dtype), qweight).shape == (*shape, 37)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_non_contiguous_x(isa, dtype):
    qweight = cases.quantized(37, 100)
    base = cases.activations(40, 301, dtype)
    for name, x in {
        "transposed": base[:, :13].T.contiguous().T[:, :].repeat(1, 8)[:, :100],
        "columns": base[:, 1:101],
        "every-other-column": base[:, 1:201:2],
        "every-other-row": base[::2, 7:107],
        "column-major": base[:, :100].T.contiguous().T,
        "expanded": base[:1, 3:103].expand(9, 100),
    }.items():
        assert_same_bits(linear(x, qweight), linear(x.clone(memory_format=torch.contiguous_format), qweight), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_x_at_any_address(isa, dtype):
    if isa == "reference":
        pytest.skip("the reference multiplies by torch, whose bits depend on the alignment of x")
    qweight = cases.quantized(37, 100)
    base = cases.activations(40, 301, dtype)
    for M in (1, 4, 9):
        for start in (1, 2, 5):
            x = base.view(-1)[start : start + M * 100].view(M, 100)
            assert_same_bits(linear(x, qweight), linear(x.clone(), qweight), f"linear {isa} M={M} offset {start}")


def test_non_contiguous_bias(isa):
    qweight = cases.quantized(37, 100)
    x = cases.activations(5, 100, torch.float32)
    bias = torch.randn(37, 3)
    assert torch.equal(linear(x, qweight, bias[:, 1]), linear(x, qweight, bias[:, 1].contiguous()))
    one = torch.randn(1)
    assert torch.equal(linear(x, qweight, one.expand(37)), linear(x, qweight, one.repeat(37)))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_x_is_not_written(isa, dtype):
    qweight = cases.quantized(37, 100)
    x = cases.activations(17, 100, dtype)
    bias = torch.randn(37, dtype=dtype)
    before = x.clone(), bias.clone(), qweight.packed.clone(), qweight.absmax.clone()
    linear(x, qweight, bias)
    for now, then in zip((x, bias, qweight.packed, qweight.absmax), before):
        assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [1, 4, 13, 64])
def test_deterministic(isa, M, dtype):
    qweight = cases.quantized(130, 1000)
    x = cases.activations(M, 1000, dtype)
    first = linear(x, qweight)
    for _ in range(5):
        assert_same_bits(linear(x, qweight), first, f"linear {isa} M={M} run after run")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(256, 512), (37, 100), (33, 65)], ids=shape_id)
@pytest.mark.parametrize("M", [1, 2, 5, 16, 33, 129])
def test_threads_do_not_change_bits(isa, M, shape, dtype):
    if isa == "reference":
        pytest.skip("the reference multiplies by torch, whose bits depend on the number of threads")
    qweight = cases.quantized(*shape)
    x = cases.activations(M, shape[1], dtype)
    torch.set_num_threads(1)
    one = linear(x, qweight)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(linear(x, qweight), one, f"linear {isa} M={M} with {threads} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(48, 320), (33, 65)], ids=shape_id)
@pytest.mark.parametrize("M", [2, 3, 4, 7, 13, 17, 64])
def test_a_row_does_not_see_the_others(isa, M, shape, dtype):
    """The same M, the same row, other values around it: the same bits, also beside NaN and inf."""
    qweight = cases.quantized(*shape)
    x = cases.activations(M, shape[1], dtype)
    alone = linear(x, qweight)
    for row in {0, M // 2, M - 1}:
        for name, value in (("NaN", torch.nan), ("inf", torch.inf), ("zero", 0.0), ("large", 1e4)):
            other = torch.full_like(x, value)
            other[row] = x[row]
            assert_same_bits(linear(other, qweight)[row], alone[row], f"linear {isa} M={M} row {row} beside {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_and_inf_reach_their_row(isa, dtype):
    qweight = cases.quantized(48, 320)
    x = cases.activations(5, 320, dtype)
    x[2, 100] = torch.nan
    x[4, 319] = torch.inf
    y = linear(x, qweight)
    assert y[2].isnan().all()
    assert not y[4].isfinite().any()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("K", [320, 100])
def test_nan_block_reaches_its_columns_only(isa, K, dtype):
    """A weight block that holds NaN makes the output columns of its rows NaN, and no other."""
    qweight = cases.quantized(40, K, Layout(scale_codebook=None))
    qweight.absmax.view(-1)[7] = torch.nan
    hit = (torch.arange(40 * K) // 64 == 7).view(40, K).any(1)
    for M in (1, 3, 17):
        y = linear(cases.activations(M, K, dtype), qweight)
        assert y[:, hit].isnan().all()
        assert y[:, ~hit].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [1, 4, 17])
def test_one_hot_x_reads_the_weight(isa, M, dtype):
    """x of one 1: each output is one element of Ŵ, whose rounding to dtype is within half a unit: no sum hides it."""
    N, K = 37, 200
    for layout in (DEFAULT, Layout(32, "custom", None)):
        qweight = cases.random_bytes(N, K, layout)
        w = cases.dense(qweight).double()
        for column in (0, 1, 31, 63, 64, 65, 127, 199):
            x = torch.zeros(M, K, dtype=dtype)
            x[M - 1, column] = 1
            y = linear(x, qweight)
            # One rounding of the output, and at most two of the weight (its level and its scale), half an eps each.
            allowed = 1.5 * torch.finfo(dtype).eps * w[:, column].abs()
            assert ((y[M - 1].double() - w[:, column]).abs() <= allowed).all(), (isa, column, layout)
            assert (y[: M - 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom"])
def test_unbiased(isa, codebook, dtype):
    qweight = cases.quantized(512, 512, Layout(codebook=codebook))
    for M in (4, 64):
        for mean in (0.0, 1.0):
            x = cases.activations(M, 512, dtype, mean)
            assert_unbiased(linear(x, qweight), x, cases.dense(qweight).T, f"linear {isa} {codebook} M={M}")


def test_fp32_is_true_fp32(isa):
    """bf16 or tf32 anywhere would be 100 times over this: 2^-20 of |x|·|Ŵ|, sums of at most 512 terms in fp32."""
    qweight = cases.quantized(64, 1024)
    w = cases.dense(qweight).double()
    for M in (1, 2, 16, 64):
        x = cases.activations(M, 1024, torch.float32)
        error = (linear(x, qweight).double() - x.double() @ w.T).abs()
        assert (error <= 2.0**-20 * (x.double().abs() @ w.abs().T)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_accumulates_in_fp32(isa, dtype):
    """Large terms that cancel: any partial sum rounded to 16 bits loses the small rest."""
    N, K = 16, 1024
    qweight = cases.quantized(N, K, Layout(scale_codebook=None))
    x = torch.zeros(3, K)
    x[:, :512] = cases.activations(3, 512, torch.float32) * 100
    x = x.to(dtype)
    half = qweight.packed[:, :256].clone()
    qweight.packed[:, 256:] = half
    qweight.absmax[:, 8:] = qweight.absmax[:, :8].clone()
    x[:, 512:] = -x[:, :512]
    x[:, 1023] = x[:, 1023] + 1 if dtype == torch.float16 else 0
    assert_product_within_bound(linear(x, qweight), x, cases.dense(qweight).T, f"linear cancels {isa}")


def test_grad_mode_does_not_change_bits(isa):
    qweight = cases.quantized(48, 320)
    for dtype in DTYPES:
        for M in (1, 5, 33):
            x = cases.activations(M, 320, dtype)
            bias = torch.randn(48, dtype=dtype)
            plain = linear(x, qweight, bias)
            with torch.no_grad():
                assert_same_bits(linear(x.requires_grad_(), qweight, bias), plain, "no_grad")
            with torch.inference_mode():
                assert_same_bits(linear(x, qweight, bias), plain, "inference_mode")
            assert_same_bits(linear(x, qweight, bias.requires_grad_()).detach(), plain, "with gradients")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_bound_bites(dtype):
    """One wrong nibble, one wrong scale, one dropped term, a 16-bit accumulator, or one NaN: each is over the bound."""
    N, K, M = 48, 320, 5
    w = cases.dense(cases.quantized(N, K))
    x = cases.activations(M, K, dtype)
    good = (x.double() @ w.double().T).to(dtype)
    assert_product_within_bound(good, x, w.T, "exact")

    def refused(actual):
        with pytest.raises(AssertionError, match=r"wrong, x \[5, 320\].*row \d has error"):
            assert_product_within_bound(actual, x, w.T, "wrong")

    wrong = w.clone()
    wrong[7, :64] *= 1.5
    refused((x.double() @ wrong.double().T).to(dtype))
    wrong = w.clone()
    wrong[:, 319] = 0
    refused((x.double() @ wrong.double().T).to(dtype))
    rolled = good.clone()
    rolled[3] = good[3].roll(1)
    refused(rolled)
    poisoned = good.clone()
    poisoned[4, 47] = torch.nan
    refused(poisoned)
    big, wide = cases.activations(64, K, dtype), cases.dense(cases.quantized(512, K))
    off_by_an_eps = big.double() @ wide.double().T * (1 + torch.finfo(dtype).eps)
    with pytest.raises(AssertionError, match="slope 1"):
        assert_unbiased(off_by_an_eps, big, wide.T, "wrong")
    if dtype != torch.float32:
        running = torch.zeros(M, N, dtype=dtype)
        for k in range(K):
            running += x[:, k : k + 1] * w[:, k].to(dtype)
        refused(running)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_the_bound_bites_on_a_codebook_rounded_to_nearest(dtype):
    """The bias of NF4's levels rounded to 16 bits shows once x has a mean, which is why the bound is checked there."""
    qweight = cases.quantized(64, 4096, Layout(scale_codebook=None))
    rounded = cases.dense(cases.with_tensors(qweight, code=qweight.code.to(dtype).float()))
    for mean, passes in ((0.0, True), (1.0, False)):
        x = cases.activations(16, 4096, dtype, mean)
        actual = (x.double() @ rounded.double().T).to(dtype)
        if passes:
            assert_product_within_bound(actual, x, cases.dense(qweight).T, "rounded levels")
        else:
            with pytest.raises(AssertionError, match="rows over: 16 of 16"):
                assert_product_within_bound(actual, x, cases.dense(qweight).T, "rounded levels")
