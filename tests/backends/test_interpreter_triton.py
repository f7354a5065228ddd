"""Triton's interpreter, corrected, does what a GPU does: bf16 is rounded to nearest even, and multiplied as numbers."""

import pytest
import torch
from support.numerics import assert_same_bits


@pytest.fixture
def kernels(interpreter):
    from support.triton_kernels import cast_kernel, dot_kernel

    return cast_kernel, dot_kernel


def test_bf16_casts(kernels):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).repeat_interleave(5).to(torch.int32) << 16
    halfway = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32).repeat(2**16)
    values = (bits | halfway).view(torch.float32)
    rounded = torch.empty(len(values), dtype=torch.bfloat16)
    for first in range(0, len(values), 2**16):
        part = slice(first, first + 2**16)
        kernels[0][(1,)](values[part], rounded[part], 2**16)
    assert_same_bits(rounded, values.bfloat16(), "fp32 to bf16")
    back = torch.empty(2**16)
    kernels[0][(1,)](rounded[: 2**16], back, 2**16)
    assert_same_bits(back, rounded[: 2**16].float(), "bf16 to fp32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(kernels, dtype):
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    out = torch.empty(16, 16)
    kernels[1][(1,)](a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
