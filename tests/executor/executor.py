"""Controls a library that `build.build` made for the host executor: settings, errors, launch log."""

import ctypes
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SCHEDULES = ("ascending", "descending", "random")  # in the order of executor.cpp's enum
COPIES = ("late", "early")
SUMS = ("rounded", "truncated")  # mma: to nearest, product by product; or as a tensor core, eight at a time
SETTINGS = tuple((schedule, copies) for schedule in SCHEDULES for copies in COPIES)
SM_90_SHARED, SM_86_SHARED = 227 << 10, 99 << 10


class Launch(NamedTuple):
    kernel: str  # without namespaces and arguments: "scale_kernel<BFloat16, 4>"
    grid: tuple[int, int, int]
    threads: int
    shared: int
    count: int


class Accesses(NamedTuple):
    """Those of one line of a kernel that have a kind and a width: see races/counts.h."""

    kernel: str
    line: str  # "linear_small.cuh:97"
    kind: str  # "shared load", "shared store", "shared copy", "global load", "global store", "global arrive"
    bytes: int  # a lane
    accesses: int  # by a warp
    ideal: int  # wavefronts of shared memory, or sectors of global memory, that they need at least,
    actual: int  # and that they take


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
        self.path = library
        self.library = ctypes.CDLL(str(library))
        settings = [ctypes.c_int, ctypes.c_uint, ctypes.c_bool, ctypes.c_size_t, ctypes.c_bool]
        self.library.nf4_executor_set.argtypes = settings
        self.library.nf4_executor_plan.argtypes = [ctypes.c_bool]
        self.library.nf4_executor_last_error.restype = ctypes.c_char_p
        self.library.nf4_executor_launches.restype = ctypes.c_char_p
        self.library.nf4_executor_sites.restype = ctypes.c_char_p
        self.library.nf4_executor_pipelines.restype = ctypes.c_char_p

    def set(self, schedule="ascending", copies="late", seed=0, shared_limit=SM_90_SHARED, sums="rounded") -> None:
        """Which runnable thread goes on, when a copy_async_16's bytes arrive, a block's limit of shared memory, and how
        the sums of an mma are rounded."""
        for name, given, known in (("schedule", schedule, SCHEDULES), ("copies", copies, COPIES), ("sums", sums, SUMS)):
            if given not in known:
                raise ValueError(f"{name} must be one of {known}, got {given}")
        late, truncated = copies == "late", sums == "truncated"
        self.library.nf4_executor_set(SCHEDULES.index(schedule), seed, late, shared_limit, truncated)
        self.limit_grid(0)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Launches inside a `with` block are checked and logged, and not run: of whatever size, and writing nothing."""
        self.library.nf4_executor_plan(True)
        try:
            yield
        finally:
            self.library.nf4_executor_plan(False)

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

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts every access of the launches within, for accesses(); the library is one of build(races=True)."""
        self.library.nf4_executor_forget_accesses()
        self.library.nf4_executor_count_accesses(True)
        yield
        self.library.nf4_executor_count_accesses(False)

    def accesses(self) -> list[Accesses]:
        """The accesses of the launches while counting, those of a line that are alike added up."""
        self.library.nf4_executor_accesses.restype = ctypes.c_char_p
        rows = [line.split("\t") for line in self.library.nf4_executor_accesses().decode().splitlines()]
        lines = _source_lines(self.path, {int(row[1]) for row in rows})
        sums = Counter()
        for kernel, place, space, access, width, *numbers in rows:
            site = kernel, lines[int(place)], f"{space} {access}", int(width)
            for i, number in enumerate(numbers):
                sums[site, i] += int(number)
        sites = dict.fromkeys(site for site, _ in sums)
        return [Accesses(*site, *(sums[site, i] for i in range(3))) for site in sites]


def _source_lines(library: Path, places: Iterable[int]) -> dict[int, str]:
    """The line of the kernels, not of the executor, of the instruction before each place in the library."""
    # -i: the function that was inlined comes first, and those that it was inlined into after it.
    command = ["addr2line", "-a", "-i", "-e", str(library)]
    asked = "".join(f"{place - 1:#x}\n" for place in places)
    output = subprocess.run(command, input=asked, capture_output=True, encoding="utf-8", check=True).stdout
    lines, place = {}, 0
    for line in output.splitlines():
        if line.startswith("0x"):
            place = int(line, 16) + 1
        elif place not in lines and "/executor.h:" not in line:
            lines[place] = line.rpartition("/")[2].partition(" ")[0]
    return lines


def _launch(line: str) -> Launch:
    count, _, grid, _, threads, _, shared, kernel = line.split(" ", 7)
    return Launch(kernel, tuple(map(int, grid.split(","))), int(threads), int(shared), int(count))
