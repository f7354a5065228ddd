"""lora_grad in Triton: scaling * small.T @ wide in fp32, rounded once, under Triton's interpreter and on a GPU."""

import math

import pytest
import torch
from support.cases import DTYPES, dtype_id
from support.numerics import assert_product_within_bound, assert_same_bits
from test_lora_grad_cuda import SCALING, inputs, lora_grad

# M, r, C: tails of 32 rows a step and 512 a part, of 16 and 32 ranks, of 64 columns.
SHAPES = ((1, 1, 8), (17, 8, 72), (600, 17, 40), (64, 70, 128), (1100, 3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_every_shape(triton_ops, dtype, mean):
    for shape in SHAPES:
        small, wide = inputs(*shape, dtype, mean)
        actual = lora_grad(triton_ops, small, wide, dtype)
        assert_product_within_bound(actual, small.T.contiguous(), SCALING * wide.float(), f"lora_grad {shape}")
        turned = lora_grad(triton_ops, small, wide, dtype, True)
        assert turned.is_contiguous()
        assert_same_bits(turned, actual.T, "transposed")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_is_rounded_once_to_the_dtype_asked_for(triton_ops, dtype):
    """fp32's error also of bf16 inputs: a tensor core drops what is below 2^-23 of its largest term, at every step."""
    for shape in SHAPES:
        small, wide = inputs(*shape, dtype)
        full = lora_grad(triton_ops, small, wide, torch.float32)
        exact = SCALING * small.double().T @ wide.double()
        magnitude = SCALING * small.double().abs().T @ wide.double().abs()
        steps = math.ceil(shape[0] / 16) + 8 if dtype != torch.float32 else shape[0]
        assert ((full.double() - exact).abs() <= (steps + 2) * 2.0**-22 * magnitude).all()
        for out_dtype in DTYPES:
            assert_same_bits(lora_grad(triton_ops, small, wide, out_dtype), full.to(out_dtype), "lora_grad")


def test_wide_of_any_strides_and_leading_dimensions(triton_ops):
    small, wide = inputs(24, 4, 40, torch.bfloat16)
    expected = lora_grad(triton_ops, small, wide, torch.float32)
    for strided in (wide.T.contiguous().T, wide.view(2, 12, 40)):
        actual = lora_grad(triton_ops, small.view(*strided.shape[:-1], 4), strided, torch.float32)
        assert_same_bits(actual, expected, "strides")


def test_empty(triton_ops):
    for M, r, C in ((0, 3, 8), (4, 0, 8), (4, 3, 0)):
        small, wide = inputs(M, r, C, torch.bfloat16)
        for transposed in (False, True):
            grad = lora_grad(triton_ops, small, wide, torch.float32, transposed)
            assert grad.shape == ((C, r) if transposed else (r, C))
            assert not grad.any()


def test_a_column_depends_on_no_other(triton_ops):
    small, wide = inputs(40, 5, 70, torch.bfloat16)
    clean = lora_grad(triton_ops, small, wide, torch.float32)
    wide[3, 66] = torch.nan
    small[7, 2] = torch.nan
    grad = lora_grad(triton_ops, small, wide, torch.float32)
    keep_rank, keep = torch.arange(5) != 2, torch.arange(70) != 66
    assert grad[2].isnan().all()
    assert grad[:, 66].isnan().all()
    assert_same_bits(grad[keep_rank][:, keep], clean[keep_rank][:, keep], "others")
