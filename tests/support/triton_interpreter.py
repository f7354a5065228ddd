"""Triton's interpreter on CPU tensors, with what it does otherwise than a GPU put right.

Triton reads TRITON_INTERPRET when a kernel is defined, so `conftest.py` sets it before anything imports Triton, on
machines without a GPU. Three things of the interpreter of Triton 3.x are wrong for us: it truncates fp32 to bf16 where
a GPU rounds to nearest even, it multiplies the bits of bf16 as integers in a dot, and it copies every tensor over
itself after a launch, also one of 4 GB of which a kernel reads a page. `test_interpreter_triton.py` holds it to that.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

LAUNCHED: list[str] = []  # the names of the kernels that ran since someone cleared it


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


@functools.cache
def correct() -> None:
    """From now on, in this process."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def corrected_cast(self, source, to):
        kinds = source.dtype.scalar, to.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(bf16_to_fp32(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(fp32_to_bf16(source.data), tl.bfloat16)
        return cast(self, source, to)

    def corrected_dot(self, a, b, accumulator, *options):
        a, b = (corrected_cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, accumulator, *options)

    builder.cast_impl, builder.create_dot = corrected_cast, corrected_dot
    executor = interpreter.GridExecutor
    executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda self, *args: None
    run = executor.__call__

    def quietly(self, *args, **kwargs):
        LAUNCHED.append(self.fn.__name__)
        with np.errstate(all="ignore"):  # inf, NaN and denormals are as ordinary as on a GPU
            return run(self, *args, **kwargs)

    executor.__call__ = quietly


@contextmanager
def only_program(x: int, y: int = 0) -> Iterator[None]:
    """Of every grid launched inside a `with` block this program alone runs: a far end of a problem of any size."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    init, program_id = executor.__init__, builder.create_get_program_id

    def one_of_grid(self, fn, arg_names, grid, *rest):
        init(self, fn, arg_names, (1,), *rest)

    def given_id(self, axis):
        return interpreter.TensorHandle(np.array([(x, y, 0)[axis]], dtype=np.int32), tl.int32)

    executor.__init__, builder.create_get_program_id = one_of_grid, given_id
    try:
        yield
    finally:
        executor.__init__, builder.create_get_program_id = init, program_id
