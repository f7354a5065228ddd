"""LoRA's term inside linear and linear_dgrad: the bound of DESIGN section 7 on the sum of both, and who sees what.

x @ Ŵ.T + s * P @ B.T is one product over a contraction of K + r: [x, P] @ [Ŵ, s * B].T, which is what the bound is
taken of. The same holds for dy @ Ŵ + s * Q @ A.
"""

import pytest
import torch
from support import cases
from support.cases import DTYPES, LAYOUTS, ROWS, Layout, dtype_id, shape_id
from support.numerics import assert_product_within_bound, assert_same_bits, row_bounds

ops = torch.ops.nf4kernels
RANKS = (1, 3, 8, 16, 17, 40, 64)
SCALING = 1.75

# N, K: one tile, odd sizes, tails of every tile, spans (odd K), and several tiles.
SHAPES = ((1, 1), (3, 5), (5, 63), (33, 65), (37, 100), (129, 31), (48, 320), (70, 96), (256, 512))


class Linear:
    name = "linear"

    @staticmethod
    def sizes(N, K):
        """(contraction, columns) of the product."""
        return K, N

    @staticmethod
    def run(a, qweight, small=None, factor=None, scaling=SCALING, bias=None):
        """factor is [r, columns], as in the formula of both."""
        return ops.linear(
            a, *qweight.op_args(), bias, small, None if factor is None else factor.T.contiguous(), scaling
        )

    @staticmethod
    def matrix(qweight):
        return cases.dense(qweight).T


class Dgrad:
    name = "linear_dgrad"

    @staticmethod
    def sizes(N, K):
        return N, K

    @staticmethod
    def run(a, qweight, small=None, factor=None, scaling=SCALING):
        return ops.linear_dgrad(a, *qweight.op_args(), small, factor, scaling)

    @staticmethod
    def matrix(qweight):
        return cases.dense(qweight)


@pytest.fixture(params=[Linear, Dgrad], ids=lambda p: p.name)
def product(request):
    return request.param


def term(M, columns, r, dtype, mean=0.0):
    """(small [M, r], factor [r, columns])"""
    return cases.activations(M, r, dtype, mean, seed=3), cases.activations(r, columns, dtype, seed=4)


def joined(a, matrix, small, factor, scaling=SCALING):
    """The product over K + r that both terms make together."""
    return torch.cat([a, small], 1), torch.cat([matrix, scaling * factor.float()], 0)


def assert_within_bound(product, qweight, M, r, dtype, what, mean=0.0, **options):
    contraction, columns = product.sizes(*qweight.shape)
    a = cases.activations(M, contraction, dtype, mean)
    small, factor = term(M, columns, r, dtype, mean)
    actual = product.run(a, qweight, small, factor, **options)
    both = joined(a, product.matrix(qweight), small, factor)
    assert_product_within_bound(actual, *both, f"{product.name} r={r} {what}", options.get("bias"))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_shape(isa, product, shape, dtype):
    qweight = cases.quantized(*shape)
    for i, M in enumerate(ROWS):
        for r in (RANKS[i % len(RANKS)], 16):
            assert_within_bound(product, qweight, M, r, dtype, f"{isa} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("r", [*RANKS, 700])
def test_every_rank(isa, product, r, dtype):
    qweight = cases.quantized(50, 130)
    for M in (1, 4, 6, 33):
        assert_within_bound(product, qweight, M, r, dtype, f"{isa} M={M}")


@pytest.mark.parametrize("layout", LAYOUTS[::3], ids=str)
def test_with_a_mean_over_a_long_contraction(isa, product, layout):
    for shape in ((4096, 64), (64, 4096)):
        qweight = cases.quantized(*shape, layout)
        for M in (3, 16):
            assert_within_bound(product, qweight, M, 16, torch.bfloat16, f"{isa} {layout} M={M}", 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [511, 512, 513, 1100])
def test_many_rows(isa, product, M, dtype):
    """Each pass over the rows reads its own part of P."""
    assert_within_bound(product, cases.quantized(70, 97), M, 5, dtype, f"{isa} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_beside_a_bias(isa, dtype):
    qweight = cases.quantized(37, 100)
    for M in (1, 4, 17):
        assert_within_bound(Linear, qweight, M, 16, dtype, f"{isa} M={M} bias", bias=torch.randn(37).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_rounds_the_sum_once(isa, product, dtype):
    """Two large terms that cancel: either of them rounded to 16 bits on its own would lose what is left."""
    N, K = 64, 64
    qweight = cases.quantized(N, K, Layout(scale_codebook=None))
    qweight.absmax.fill_(1.0)
    matrix = product.matrix(qweight).to(dtype)
    for M in (3, 17):
        a = cases.activations(M, 64, dtype)
        actual = product.run(a, qweight, a, -matrix, 1.0)  # r = 64: the low-rank term is minus the rounded product
        left = a.double() @ (product.matrix(qweight).double() - matrix.double())
        # Where the kernel rounds Ŵ, by at most an eps each, that is all that differs.
        allowed = torch.finfo(dtype).eps * (a.double().abs() @ matrix.double().abs())
        assert ((actual.double() - left).abs() <= allowed + 2.0**-20).all()
        if isa != "avx512_bf16" or dtype == torch.float16:
            assert (actual.double() - left).norm() <= 2.0**-7 * left.norm()


@pytest.mark.parametrize("scaling", [0.0, 1.0, -0.3, 16.0])
def test_scaling(isa, product, scaling):
    qweight = cases.quantized(37, 100)
    contraction, columns = product.sizes(37, 100)
    for M in (2, 9):
        a, (small, factor) = cases.activations(M, contraction, torch.float32), term(M, columns, 4, torch.float32)
        actual = product.run(a, qweight, small, factor, scaling)
        both = joined(a, product.matrix(qweight), small, factor, scaling)
        assert_product_within_bound(actual, *both, f"{product.name} {isa} scaling {scaling}")
        if scaling == 0:
            assert_same_bits(actual, product.run(a, qweight), f"{product.name} {isa} scaling 0")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_factor_of_zeros_changes_no_bit(isa, product, dtype):
    """A fresh adapter, and rank 0."""
    qweight = cases.quantized(48, 320)
    contraction, columns = product.sizes(48, 320)
    for M in (0, 1, 4, 5, 33):
        a = cases.activations(M, contraction, dtype)
        plain = product.run(a, qweight)
        for r in (0, 1, 16):
            small, factor = term(M, columns, r, dtype)
            assert_same_bits(product.run(a, qweight, small, torch.zeros_like(factor)), plain, f"{isa} M={M} r={r}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=shape_id)
def test_empty_weight(isa, product, shape, dtype):
    qweight = cases.quantized(*shape)
    contraction, columns = product.sizes(*shape)
    for M in (0, 1, 7):
        small, factor = term(M, columns, 3, dtype)
        actual = product.run(torch.ones(M, contraction, dtype=dtype), qweight, small, factor)
        assert actual.shape == (M, columns)
        if contraction == 0:
            assert_product_within_bound(actual, small, SCALING * factor.float(), f"{product.name} {isa}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_leading_dimensions(isa, product, dtype):
    qweight = cases.quantized(37, 100)
    contraction, columns = product.sizes(37, 100)
    a, (small, factor) = cases.activations(24, contraction, dtype), term(24, columns, 3, dtype)
    expected = product.run(a, qweight, small, factor)
    for shape in ((2, 3, 4), (24, 1), (1, 24)):
        actual = product.run(a.view(*shape, -1), qweight, small.view(*shape, 3), factor)
        assert_same_bits(actual, expected.view(*shape, columns), f"{product.name} {shape}")
        flat = product.run(a.view(*shape, -1), qweight, small, factor)
        assert_same_bits(flat, actual, f"{product.name} {shape}, small factor without leading dimensions")
    one = product.run(a[5:6], qweight, small[5:6], factor)
    assert_same_bits(product.run(a[5], qweight, small[5], factor), one[0], "no leading dimension")


def test_non_contiguous_input(isa, product):
    qweight = cases.quantized(37, 100)
    contraction, columns = product.sizes(37, 100)
    a, (small, factor) = cases.activations(9, 2 * contraction, torch.bfloat16), term(9, columns, 4, torch.bfloat16)
    for strided in (a[:, ::2], a[:, :contraction], a[:1, :contraction].expand(9, -1)):
        expected = product.run(strided.contiguous(), qweight, small, factor)
        assert_same_bits(product.run(strided, qweight, small, factor), expected, f"{product.name} {isa}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [1, 4, 5, 33, 129])
def test_threads_and_repetition_do_not_change_bits(isa, product, M, dtype):
    if isa == "reference":
        pytest.skip("the reference multiplies by torch, whose bits depend on the number of threads")
    qweight = cases.quantized(256, 512)
    contraction, columns = product.sizes(256, 512)
    a, (small, factor) = cases.activations(M, contraction, dtype), term(M, columns, 16, dtype)
    torch.set_num_threads(1)
    one = product.run(a, qweight, small, factor)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert_same_bits(product.run(a, qweight, small, factor), one, f"{product.name} {isa} {threads} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [3, 4, 7, 17])
def test_a_row_does_not_see_the_others(isa, product, M, dtype):
    qweight = cases.quantized(48, 320)
    contraction, columns = product.sizes(48, 320)
    a, (small, factor) = cases.activations(M, contraction, dtype), term(M, columns, 5, dtype)
    alone = product.run(a, qweight, small, factor)
    for row in {0, M // 2, M - 1}:
        for value in (torch.nan, torch.inf, 0.0):
            other = torch.full_like(small, value)
            other[row] = small[row]
            actual = product.run(a, qweight, other, factor)
            assert_same_bits(actual[row], alone[row], f"{product.name} {isa} M={M} row {row} beside {value}")
            if value != 0:
                assert not actual[torch.arange(M) != row].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_nan_in_the_factor_reaches_its_column_only(isa, product, dtype):
    for shape in ((48, 320), (37, 101)):
        qweight = cases.quantized(*shape)
        contraction, columns = product.sizes(*shape)
        for M in (1, 4, 17):
            a, (small, factor) = cases.activations(M, contraction, dtype), term(M, columns, 5, dtype)
            for column in (0, 1, 30, columns - 1):
                poisoned = factor.clone()
                poisoned[3, column] = torch.nan
                y = product.run(a, qweight, small, poisoned)
                assert y[:, column].isnan().all()
                assert y[:, torch.arange(columns) != column].isfinite().all(), (product.name, isa, shape, M, column)


def test_the_bound_bites():
    """One rank left out, the scaling left out, or two columns swapped: each is over the bound."""
    qweight = cases.quantized(48, 320)
    a, (small, factor) = cases.activations(5, 320, torch.bfloat16), term(5, 48, 16, torch.bfloat16)
    both = joined(a, cases.dense(qweight).T, small, factor)
    good, _ = row_bounds(*both)
    assert_product_within_bound(good.bfloat16(), *both, "exact")
    wrong = {
        "rank": good - SCALING * small[:, 15:].double() @ factor[15:].double(),
        "scaling": good - (SCALING - 1) * small.double() @ factor.double(),
        "swapped": good[:, [1, 0, *range(2, 48)]],
    }
    for name, values in wrong.items():
        with pytest.raises(AssertionError, match="has error"):
            assert_product_within_bound(values.bfloat16(), *both, name)
