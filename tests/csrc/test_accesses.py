"""Bank conflicts and sectors as the host executor counts them, and the accesses that must have no conflicts."""

import platform
import shutil

import numpy as np
import pytest
from executor.build import CXX
from executor.executor import Executor
from executor.faults import aligned, library_with_races, run

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="tests/executor switches fibers in x86-64 assembly"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"tests/executor needs {CXX}"),
]


@pytest.fixture(scope="module")
def executor():
    return Executor(library_with_races())


def counted(executor: Executor, kernel: str, *arguments) -> dict[str, tuple[int, int, int, int]]:
    """kind -> (bytes, accesses, ideal, actual) of one launch; of several lines of a kind the last one."""
    with executor.counting():
        assert run(executor, kernel, *arguments) == 0, executor.error()
    return {row.kind: tuple(row[3:]) for row in executor.accesses()}


def words(count: int, past: int = 0) -> np.ndarray:
    """So many words, the first one `past` words past a multiple of 32 bytes."""
    whole = aligned(count + 16, np.uint32)
    begin = -whole.ctypes.data // 4 % 8 + past
    return whole[begin : begin + count]


def strided(executor: Executor, width: int, stride: int, alike: int = 1, past: int = 0) -> dict:
    return counted(
        executor, "stride", width, stride, alike, words(32 * stride * width // 4, past), words(32 * width // 4)
    )


@pytest.mark.parametrize(
    ("width", "stride", "ideal", "actual"),
    [
        (4, 1, 1, 1),
        (4, 2, 1, 2),
        (4, 8, 1, 8),
        (4, 32, 1, 32),
        (4, 33, 1, 1),
        (8, 1, 2, 2),  # two half-warps
        (8, 2, 2, 4),
        (8, 16, 2, 32),
        (16, 1, 4, 4),  # four quarter-warps
        (16, 2, 4, 8),
        (16, 8, 4, 32),
        (16, 9, 4, 4),
    ],
)
def test_wavefronts_of_shared_memory(executor, width, stride, ideal, actual):
    rows = strided(executor, width, stride)
    assert rows["shared store"] == rows["shared load"] == (width, 1, ideal, actual)


def test_lanes_that_read_one_word_are_served_together(executor):
    assert strided(executor, 4, 32, alike=32)["shared load"] == (4, 1, 1, 1)
    assert strided(executor, 4, 32, alike=8)["shared load"] == (4, 1, 1, 4)
    assert strided(executor, 8, 16, alike=16)["shared load"] == (8, 1, 2, 2)


@pytest.mark.parametrize(
    ("width", "stride", "past", "ideal", "actual"),
    [
        (4, 1, 0, 4, 4),
        (4, 1, 1, 4, 5),
        (4, 2, 0, 4, 8),
        (4, 8, 0, 4, 32),
        (4, 64, 0, 4, 32),
        (8, 1, 0, 8, 8),
        (8, 3, 0, 8, 24),
        (16, 1, 0, 16, 16),
        (16, 1, 4, 16, 17),
        (16, 2, 0, 16, 32),
    ],
)
def test_sectors_of_global_memory(executor, width, stride, past, ideal, actual):
    rows = strided(executor, width, stride, past=past)
    assert rows["global load"] == (width, 1, ideal, actual)
    assert rows["global store"] == (width, 1, width, width)


# run_tile's kinds, and how many times as many wavefronts the loads take as they need.
TILES = {
    "16-bytes-a-lane": (0, 1),
    "16-bytes-a-lane-not-swizzled": (1, 2),
    "8-bytes-a-lane-of-128": (2, 1),
    "8-bytes-a-lane-of-128-not-swizzled": (3, 4),
    "8-bytes-a-lane-of-64": (4, 1),
    "8-bytes-a-lane-of-64-not-swizzled": (5, 2),
    "8-bytes-a-lane-of-32": (6, 1),  # which needs no swizzle
}


@pytest.mark.parametrize("tile", TILES)
def test_a_swizzled_tile_is_read_without_conflicts(executor, tile):
    kind, times = TILES[tile]
    rows = counted(executor, "tile", kind, aligned(2048, np.uint32), aligned(512, np.uint32))
    _, accesses, ideal, actual = rows["shared load"]
    assert accesses > 0
    assert actual == times * ideal
    assert rows["shared copy"][2] == rows["shared copy"][3], "the copies into it have none either"
