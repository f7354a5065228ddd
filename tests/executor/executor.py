"""Controls a library that `build.build` made for the host executor: settings, errors, launch log."""

import ctypes
from pathlib import Path
from typing import NamedTuple

SCHEDULES = ("ascending", "descending", "random")  # in the order of executor.cpp's enum
COPIES = ("late", "early")
SETTINGS = tuple((schedule, copies) for schedule in SCHEDULES for copies in COPIES)
SM_90_SHARED, SM_86_SHARED = 227 << 10, 99 << 10


class Launch(NamedTuple):
    kernel: str  # without namespaces and arguments: "scale_kernel<BFloat16, 4>"
    grid: tuple[int, int, int]
    threads: int
    shared: int
    count: int


class Executor:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.nf4_executor_set.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_bool, ctypes.c_size_t]
        self.library.nf4_executor_last_error.restype = ctypes.c_char_p
        self.library.nf4_executor_launches.restype = ctypes.c_char_p

    def set(self, schedule="ascending", copies="late", seed=0, shared_limit=SM_90_SHARED) -> None:
        """Which runnable thread goes on, when a copy_async_16's bytes arrive, and a block's limit of shared memory."""
        if schedule not in SCHEDULES or copies not in COPIES:
            raise ValueError(f"schedule must be one of {SCHEDULES} and copies of {COPIES}, got {schedule}, {copies}")
        self.library.nf4_executor_set(SCHEDULES.index(schedule), seed, copies == "late", shared_limit)

    def error(self) -> str:
        """The message of the last launch that failed since reset; empty if none did."""
        return self.library.nf4_executor_last_error().decode()

    def launches(self) -> list[Launch]:
        """The launches that ran to their end since reset, equal ones counted together."""
        return [_launch(line) for line in self.library.nf4_executor_launches().decode().splitlines()]

    def reset(self) -> None:
        self.library.nf4_executor_reset()


def _launch(line: str) -> Launch:
    count, _, grid, _, threads, _, shared, kernel = line.split(" ", 7)
    return Launch(kernel, tuple(map(int, grid.split(","))), int(threads), int(shared), int(count))
