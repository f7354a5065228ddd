"""Controls a library that `build.build` made for the host executor: settings, errors, launch log."""

import ctypes
from collections.abc import Iterator
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


class Executor:
    def __init__(self, library: Path):
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.library.nf4_executor_set.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_bool, ctypes.c_size_t]
        self.library.nf4_executor_plan.argtypes = [ctypes.c_bool]
        self.library.nf4_executor_last_error.restype = ctypes.c_char_p
        self.library.nf4_executor_launches.restype = ctypes.c_char_p
        self.library.nf4_executor_kernels.restype = ctypes.c_char_p

    def set(self, schedule="ascending", copies="late", seed=0, shared_limit=SM_90_SHARED, sums="rounded") -> None:
        """Which runnable thread goes on, when a copy_async_16's bytes arrive, a block's limit of shared memory, and how
        the sums of an mma are rounded."""
        for name, given, known in (("schedule", schedule, SCHEDULES), ("copies", copies, COPIES), ("sums", sums, SUMS)):
            if given not in known:
                raise ValueError(f"{name} must be one of {known}, got {given}")
        late, truncated = copies == "late", sums == "truncated"
        self.library.nf4_executor_set(SCHEDULES.index(schedule), seed, late, shared_limit, truncated)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Launches inside a `with` block are checked and logged, and not run: of whatever size, and writing nothing."""
        self.library.nf4_executor_plan(True)
        try:
            yield
        finally:
            self.library.nf4_executor_plan(False)

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

    def kernels(self) -> list[str]:
        """The kernels that have run to their end since the library was loaded, whatever was reset."""
        return self.library.nf4_executor_kernels().decode().splitlines()

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
    output = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout
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
