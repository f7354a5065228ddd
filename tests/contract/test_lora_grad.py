"""lora_grad: scaling * small.T @ wide within DESIGN section 7's bound, or in fp32 whatever the inputs' dtype."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, dtype_id, shape_id
from support.numerics import assert_product_within_bound, assert_same_bits

lora_grad = torch.ops.nf4kernels.lora_grad
SCALING = 1.75
# M, r, C: one element, tails of every tile and of the runs of 64 rows, ranks past one pass, several tiles.
SHAPES = (
    (1, 1, 1),
    (2, 3, 5),
    (3, 16, 33),
    (5, 4, 64),
    (17, 1, 100),
    (63, 5, 31),
    (64, 8, 48),
    (65, 16, 130),
    (130, 70, 40),
)


def inputs(M, r, C, dtype, mean=0.0):
    return cases.activations(M, r, dtype, mean, seed=1), cases.activations(M, C, dtype, mean, seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [*SHAPES, (700, 16, 64)], ids=shape_id)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_every_shape(isa, shape, dtype, mean):
    small, wide = inputs(*shape, dtype, mean)
    what = f"lora_grad {isa}"
    actual = lora_grad(small, wide, SCALING, dtype)
    assert_product_within_bound(actual, small.T.contiguous(), SCALING * wide.float(), what)
    turned = lora_grad(small, wide, SCALING, dtype, True)
    assert turned.is_contiguous()
    assert_same_bits(turned, actual.T, f"{what} transposed")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_is_rounded_once_to_the_dtype_asked_for(isa, shape, dtype, out_dtype):
    """An fp32 adapter's gradient has fp32's error, also of bf16 inputs: 2^-20 of |small|·|wide| and no more."""
    small, wide = inputs(*shape, dtype)
    full = lora_grad(small, wide, SCALING, torch.float32)
    exact = SCALING * small.double().T @ wide.double()
    magnitude = SCALING * small.double().abs().T @ wide.double().abs()
    assert ((full.double() - exact).abs() <= 2.0**-20 * magnitude).all()
    assert_same_bits(lora_grad(small, wide, SCALING, out_dtype), full.to(out_dtype), f"lora_grad {isa}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_more_rows_than_one_running_sum_may_have(isa, dtype):
    """512 runs of 64 rows, then a second block of them."""
    if isa == "reference":
        pytest.skip("the reference multiplies by torch, whose sums are as long as it likes")
    small, wide = inputs(32768 + 70, 3, 5, dtype, 1.0)
    actual = lora_grad(small, wide, 1.0, torch.float32).double()
    exact = small.double().T @ wide.double()
    # Sums of at most 512 terms three deep, 2^-24 each in the worst case, and much less in fact.
    assert ((actual - exact).abs() <= 2.0**-18 * (small.double().abs().T @ wide.double().abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(0, 4, 33), (3, 0, 33), (3, 4, 0), (0, 0, 0)], ids=shape_id)
def test_empty(isa, shape, dtype):
    M, r, C = shape
    for transposed in (False, True):
        actual = lora_grad(*inputs(M, r, C, dtype), SCALING, dtype, transposed)
        assert torch.equal(actual, torch.zeros((C, r) if transposed else (r, C), dtype=dtype))


def test_leading_dimensions_and_strides(isa):
    small, wide = inputs(24, 4, 37, torch.bfloat16)
    expected = lora_grad(small, wide, SCALING, torch.float32)
    for shape in ((2, 3, 4), (24, 1), (1, 24)):
        actual = lora_grad(small.view(*shape, 4), wide.view(*shape, 37), SCALING, torch.float32)
        assert_same_bits(actual, expected, f"lora_grad {isa} {shape}")
    one = lora_grad(small[0], wide[0], SCALING, torch.float32)
    assert_same_bits(one, lora_grad(small[:1], wide[:1], SCALING, torch.float32), "no leading dimension")
    for strided in (wide[:1].expand(24, 37), wide.T.contiguous().T, torch.cat([wide, wide], 1)[:, 37:]):
        plain = lora_grad(small, strided.contiguous(), SCALING, torch.float32)
        assert_same_bits(lora_grad(small, strided, SCALING, torch.float32), plain, f"lora_grad {isa} strides")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [1, 16, 200])
def test_threads_and_repetition_do_not_change_bits(isa, M, dtype):
    if isa == "reference":
        pytest.skip("the reference multiplies by torch, whose bits depend on the number of threads")
    small, wide = inputs(M, 16, 2000, dtype)
    torch.set_num_threads(1)
    one = lora_grad(small, wide, SCALING, dtype)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert_same_bits(lora_grad(small, wide, SCALING, dtype), one, f"lora_grad {isa} {threads} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("M", [5, 66])
def test_nan_reaches_its_row_or_column_only(isa, M, dtype):
    small, wide = inputs(M, 6, 70, dtype)
    for row, column in ((0, 0), (M - 1, 69), (M // 2, 33)):
        poisoned = wide.clone()
        poisoned[row, column] = torch.nan
        columns = lora_grad(small, poisoned, SCALING, dtype).isnan()
        assert columns[:, column].all()
        assert columns.sum() == 6
        poisoned = small.clone()
        poisoned[row, column % 6] = torch.nan
        ranks = lora_grad(poisoned, wide, SCALING, dtype).isnan()
        assert ranks[column % 6].all()
        assert ranks.sum() == 70
