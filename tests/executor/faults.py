"""Runs the kernels of faults.cu and tiles.cu on the host executor, and computes what they should give."""

import ctypes
from pathlib import Path

import numpy as np

from .build import EXECUTOR, build
from .executor import SETTINGS, Executor

THREADS = 128
EVERY_SETTING = [*((schedule, copies, 0) for schedule, copies in SETTINGS), *(("random", "late", s) for s in (1, 2, 3))]
NUMBERS = np.random.default_rng(42).standard_normal(64 * THREADS).astype(np.float32)


def library_with_races() -> Path:
    return build("faults", [EXECUTOR / "faults.cu", EXECUTOR / "tiles.cu"], races=True)


def run(executor: Executor, kernel: str, *args) -> int:
    """Launches a kernel; returns its cudaError_t."""
    pointers = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int(a) for a in args]
    return executor.library[f"run_{kernel}"](*pointers)


def line_of(text: str, occurrence: int = 0) -> str:
    """The place of a line of faults.cu, as the executor reports it."""
    lines = [
        i for i, line in enumerate((EXECUTOR / "faults.cu").read_text(encoding="utf-8").splitlines(), 1) if text in line
    ]
    return f"faults.cu:{lines[occurrence]}"


def shift(executor: Executor, variant: int, by: int) -> tuple[np.ndarray, np.ndarray]:
    """The result and what it should be."""
    out = np.zeros(THREADS, np.float32)
    assert run(executor, "shift", variant, NUMBERS, out, by) == 0, executor.error()
    i = np.arange(THREADS)
    inside = (i + by >= 0) & (i + by < THREADS)
    return out, NUMBERS[np.where(inside, i + by, i)]


def sums(executor: Executor, variant: int = 0, grid: tuple[int, int, int] = (1, 1, 1)) -> tuple:
    """The error, the result and what it should be."""
    out = np.zeros(np.prod(grid), np.float32)
    code = run(executor, "sum", variant, NUMBERS, out, *grid)
    return code, out, NUMBERS[: out.size * THREADS].reshape(out.size, THREADS).sum(1)


def pipeline(executor: Executor, variant: int, steps: int = 5) -> tuple:
    """The error, the result and what it should be."""
    out = np.zeros(THREADS, np.float32)
    code = run(executor, "pipeline", variant, NUMBERS, out, steps)
    expected = np.zeros(THREADS, np.float32)
    for row in NUMBERS[: steps * THREADS].reshape(steps, THREADS):
        expected += row[::-1]
    return code, out, expected


def arrival(executor: Executor, variant: int, blocks: int = 5) -> tuple:
    """The error, the result, what it should be, and the counter."""
    out, partial = np.zeros(THREADS, np.float32), np.full(blocks * THREADS, np.nan, np.float32)
    counter, expected = np.zeros(1, np.uint32), np.zeros(THREADS, np.float32)
    code = run(executor, "arrival", variant, blocks, NUMBERS, partial, counter, out)
    for row in NUMBERS[: blocks * THREADS].reshape(blocks, THREADS):
        expected += row
    return code, out, expected, counter[0]


def aligned(count: int, dtype) -> np.ndarray:
    """An array at a multiple of 16 bytes."""
    raw = np.zeros(count * np.dtype(dtype).itemsize + 16, np.uint8)
    return raw[-raw.ctypes.data % 16 :][: count * np.dtype(dtype).itemsize].view(dtype)
