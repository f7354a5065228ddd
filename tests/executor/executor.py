"""Controls a library that `build.build` made for the host executor: settings, errors, launch log."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
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


class Pipeline(NamedTuple):
    """A kernel's stages of copies in the background, and the fewest and most steps of a thread that copied."""

    kernel: str
    stages: int
    fewest: int
    most: int

    @property
    def is_reused(self) -> bool:
        """Whether a stage is filled again by some thread while others may still read what was in it."""
        return self.most >= self.stages + 2


class Site(NamedTuple):
    """A call that a mutant can change: of sync_block, copy_async_wait or another name of device.cuh, by this kernel."""

    kernel: str
    what: str
    place: str  # "<path>:<line>"


# How a mutant changes the calls at a site, in the order of executor.h's enum.
CHANGES = ("none", "removed", "unordered", "late", "short")


class Executor:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.nf4_executor_set.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_bool, ctypes.c_size_t]
        self.library.nf4_executor_last_error.restype = ctypes.c_char_p
        self.library.nf4_executor_launches.restype = ctypes.c_char_p
        self.library.nf4_executor_sites.restype = ctypes.c_char_p
        self.library.nf4_executor_pipelines.restype = ctypes.c_char_p

    def set(self, schedule="ascending", copies="late", seed=0, shared_limit=SM_90_SHARED) -> None:
        """Which runnable thread goes on, when a copy_async_16's bytes arrive, and a block's limit of shared memory."""
        if schedule not in SCHEDULES or copies not in COPIES:
            raise ValueError(f"schedule must be one of {SCHEDULES} and copies of {COPIES}, got {schedule}, {copies}")
        self.library.nf4_executor_set(SCHEDULES.index(schedule), seed, copies == "late", shared_limit)
        self.limit_grid(0)

    def error(self) -> str:
        """The message of the last launch that failed since reset; empty if none did."""
        return self.library.nf4_executor_last_error().decode()

    def launches(self) -> list[Launch]:
        """The launches that ran to their end since reset, equal ones counted together."""
        return [_launch(line) for line in self.library.nf4_executor_launches().decode().splitlines()]

    def sites(self) -> dict[Site, bool]:
        """What was reached since reset, and whether it is a barrier after which copies begin before the next."""
        lines = [line.split(" ", 2) for line in self.library.nf4_executor_sites().decode().splitlines()]
        sites = {Site(kernel, what, place): False for what, place, kernel in lines}
        return {
            site: Site(site.kernel, f"{site.what}-copies", site.place) in sites
            for site in sites
            if not site.what.endswith("-copies")
        }

    def pipelines(self) -> list[Pipeline]:
        """Of every kernel launched since reset that copied in the background."""
        lines = [line.split(" ", 3) for line in self.library.nf4_executor_pipelines().decode().splitlines()]
        return [Pipeline(kernel, *map(int, counts)) for *counts, kernel in lines]

    def change(self, site: Site, change: str) -> None:
        """From now on this kernel's calls at this site are changed so."""
        self.library.nf4_executor_change(*(text.encode() for text in site), CHANGES.index(change))

    @contextmanager
    def changed(self, site: Site, change: str) -> Iterator[None]:
        self.change(site, change)
        try:
            yield
        finally:
            self.change(site, "none")

    def limit_grid(self, blocks: int) -> None:
        """Run at most so many blocks along x and y, of kernels whose blocks loop over the grid; 0: all."""
        self.library.nf4_executor_limit_grid(blocks)

    def reset(self) -> None:
        self.library.nf4_executor_reset()


def _launch(line: str) -> Launch:
    count, _, grid, _, threads, _, shared, kernel = line.split(" ", 7)
    return Launch(kernel, tuple(map(int, grid.split(","))), int(threads), int(shared), int(count))
