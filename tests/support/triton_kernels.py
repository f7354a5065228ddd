"""Kernels that show what an element of Triton does, for test_interpreter_triton.py."""

import triton
import triton.language as tl


@triton.jit
def cast_kernel(source, to, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(to + i, tl.load(source + i).to(to.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, out):
    i, k = tl.arange(0, 16), tl.arange(0, 32)
    left = tl.load(a + i[:, None] * 32 + k[None, :])
    right = tl.load(b + k[:, None] * 16 + i[None, :])
    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(left, right, input_precision="ieee"))
