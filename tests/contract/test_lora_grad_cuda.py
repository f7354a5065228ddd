"""lora_grad on CUDA: scaling * small.T @ wide in fp32, rounded once, on the host executor and on a GPU."""

import math

import pytest
import torch
from support import cases
from support.cases import DTYPES, dtype_id, shape_id
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits

SCALING = 1.75
# M, r, C: tails of the 16 rows of a mma and the 8 warps, of 8, 16 and 32 ranks, of 64 columns; then what has no
# tensor-core kernel (C % 8 != 0).
SHAPES = ((1, 1, 8), (5, 4, 64), (17, 8, 72), (130, 16, 136), (300, 17, 40), (64, 70, 128), (2, 3, 5), (65, 16, 33))


def inputs(M, r, C, dtype, mean=0.0):
    return cases.activations(M, r, dtype, mean, seed=1), cases.activations(M, C, dtype, mean, seed=2)


def lora_grad(cuda_ops, small, wide, dtype, transposed=False):
    return cuda_ops.ops.lora_grad(*cuda_ops.move((small, wide)), SCALING, dtype, transposed).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_every_shape(cuda_ops, shape, dtype, mean):
    small, wide = inputs(*shape, dtype, mean)
    actual = lora_grad(cuda_ops, small, wide, dtype)
    assert_product_within_bound(actual, small.T.contiguous(), SCALING * wide.float(), "lora_grad")
    turned = lora_grad(cuda_ops, small, wide, dtype, True)
    assert turned.is_contiguous()
    assert_same_bits(turned, actual.T, "transposed")
    if cuda_ops.launches() is not None:
        tensor_cores = dtype != torch.float32 and shape[2] % 8 == 0
        assert any(("any" in run.kernel) != tensor_cores for run in cuda_ops.launches() if "lora_grad" in run.kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=dtype_id)
def test_is_rounded_once_to_the_dtype_asked_for(cuda_ops, dtype, out_dtype):
    """fp32's error also of bf16 inputs: a tensor core drops what is below 2^-23 of its largest term, at every step."""
    for shape in SHAPES:
        small, wide = inputs(*shape, dtype)
        full = lora_grad(cuda_ops, small, wide, torch.float32)
        exact = SCALING * small.double().T @ wide.double()
        magnitude = SCALING * small.double().abs().T @ wide.double().abs()
        steps = math.ceil(shape[0] / 16) + 8 if dtype != torch.float32 else shape[0]
        assert ((full.double() - exact).abs() <= (steps + 2) * 2.0**-22 * magnitude).all()
        assert_same_bits(lora_grad(cuda_ops, small, wide, out_dtype), full.to(out_dtype), "lora_grad")


def test_splits_of_the_depth(executor_ops):
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


def test_bits_do_not_depend_on_the_order_of_threads(cuda_ops):
    for shape in ((300, 17, 136), (65, 16, 33)):
        small, wide = inputs(*shape, torch.bfloat16)
        expected = lora_grad(cuda_ops, small, wide, torch.float32)
        for setting in cuda_ops.settings():
            assert_same_bits(lora_grad(cuda_ops, small, wide, torch.float32), expected, str(setting))


@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_outside_of_a_tensor_is_read(executor_ops, at_end):
    for shape in ((17, 3, 72), (16, 16, 64), (7, 5, 9)):
        small, wide = inputs(*shape, torch.bfloat16)
        aligned = wide.nbytes % 16 == 0 or shape[2] % 8 != 0
        fenced = guarded(small, at_end), guarded(wide, at_end) if aligned else wide
        expected = executor_ops.ops.lora_grad(small, wide, 1.0, torch.float32)
        assert_same_bits(executor_ops.ops.lora_grad(*fenced, 1.0, torch.float32), expected, shape_id(shape))


def test_wide_of_any_strides_and_leading_dimensions(cuda_ops):
    small, wide = inputs(24, 4, 40, torch.bfloat16)
    expected = lora_grad(cuda_ops, small, wide, torch.float32)
    for strided in (wide.T.contiguous().T, wide.view(2, 12, 40), cases.activations(1, 1, torch.bfloat16)):
        if strided.numel() == 1:  # a wide that begins off 16 bytes
            buffer = torch.empty(1 + wide.numel(), dtype=wide.dtype)
            strided = buffer[1:].view_as(wide).copy_(wide)
        actual = lora_grad(cuda_ops, small.view(*strided.shape[:-1], 4), strided, torch.float32)
        assert ((actual - expected).abs() <= 2.0**-18 * expected.abs().max()).all()


def test_empty(cuda_ops):
    for M, r, C in ((0, 3, 8), (4, 0, 8), (4, 3, 0)):
        small, wide = inputs(M, r, C, torch.bfloat16)
        grad = lora_grad(cuda_ops, small, wide, torch.float32)
        assert grad.shape == (r, C)
        assert not grad.any()
