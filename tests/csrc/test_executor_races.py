"""The race detector of the host executor (executor/races/): what it must find, and what it must leave alone.

Each mistake is a variant of a kernel in executor/faults.cu. A race is found under every schedule, also where the values
come out right.
"""

import platform
import re
import shutil

import numpy as np
import pytest
from executor.build import CXX
from executor.executor import SETTINGS, Executor
from executor.faults import (
    EVERY_SETTING,
    NUMBERS,
    THREADS,
    aligned,
    arrival,
    library_with_races,
    line_of,
    pipeline,
    run,
    shift,
    sums,
)

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="tests/executor switches fibers in x86-64 assembly"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"tests/executor needs {CXX}"),
]
LAUNCH_FAILURE = 719


@pytest.fixture(scope="module")
def library():
    return library_with_races()


@pytest.fixture
def executor(library):
    executor = Executor(library)
    yield executor
    executor.set()
    executor.reset()


def launch(executor: Executor, kernel: str, variant: int) -> int:
    """The error of a variant of a kernel, on operands that suit it."""
    out = np.zeros(THREADS, np.float32)
    return {
        "shift": lambda: run(executor, "shift", variant, NUMBERS, out, 1),
        "sum": lambda: sums(executor, variant, (3, 2, 4))[0],
        "pipeline": lambda: pipeline(executor, variant)[0],
        "arrival": lambda: arrival(executor, variant)[0],
        "pair": lambda: run(executor, "pair", variant, NUMBERS, out),
        "bytes": lambda: run(executor, "bytes", variant, np.zeros(THREADS, np.uint8), np.zeros(THREADS, np.uint8)),
        "in_place": lambda: run(executor, "in_place", variant, 3, aligned(3 * THREADS, np.float32)),
        "address": lambda: run(
            executor, "address", variant, aligned(2 * THREADS + 1, np.uint32), aligned(2 * THREADS, np.uint32)
        ),
    }[kernel]()


CORRECT = [
    ("shift", 0), ("sum", 0), ("pipeline", 0), ("arrival", 0), ("arrival", 2), ("pair", 0), ("bytes", 0),
    ("in_place", 0), ("address", 0),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "variant"), CORRECT)
def test_correct_kernels_have_no_races(executor, kernel, variant):
    for setting in EVERY_SETTING:
        executor.set(*setting)
        assert launch(executor, kernel, variant) == 0, executor.error()


def test_results_are_as_without_the_detector(executor):
    np.testing.assert_array_equal(*shift(executor, 0, 40))
    for code, out, expected, *_ in (sums(executor, 0, (3, 2, 4)), pipeline(executor, 0), arrival(executor, 2)):
        assert code == 0
        np.testing.assert_allclose(out, expected, atol=1e-4)


NO_BARRIER, NO_ARRIVAL = "no barrier orders them", "no fence_device and arrive order their blocks"
IN_FLIGHT = "the copy is in flight until that thread's copy_async_wait"
READ_ONLY = "what load_cached, load_streamed or a copy reads may not be written by the same launch"
BY_L2 = "what another block wrote is read by load_l2 alone"
STAGED = "staged[i] = in[i];"
COPY, READ_STAGE = "copy_async_16(to", "sum += stages["
PARTIAL, LOAD_PARTIAL = "partial[blockIdx.x * kThreads + threadIdx.x] = in[", "sum += load_l2(of_block)"
PAIR, READ_PAIR = "staged[kVariant == Pair::kSameWord ?", "const float other = staged["

# What is wrong: (kernel, variant, the rule that is broken, the source lines of the two accesses); which of these comes
# first depends on the schedule.
RACES = {
    "no-barrier": ("shift", 1, NO_BARRIER, (STAGED, "out[i] = staged[from]")),
    "a-barrier-of-the-warp-alone": ("shift", 2, NO_BARRIER, (STAGED, "out[i] = staged[from]")),
    "no-barrier-within-a-warp": ("pair", 1, NO_BARRIER, (PAIR, READ_PAIR)),
    "a-shuffle-is-no-barrier": ("pair", 2, NO_BARRIER, (PAIR, READ_PAIR)),
    "an-mma-is-no-barrier": ("pair", 3, NO_BARRIER, (PAIR, READ_PAIR)),
    "sync_warp-for-another-warp": ("pair", 4, NO_BARRIER, (PAIR, READ_PAIR)),
    "written-again-while-others-read": ("pair", 5, NO_BARRIER, (READ_PAIR, "staged[i] = other")),
    "two-write-one-word": ("pair", 6, NO_BARRIER, (PAIR, PAIR)),
    "two-write-one-byte": ("bytes", 1, NO_BARRIER, (STAGED, "staged[i ^ 1] = in[i ^ 1]")),
    "a-copy-without-a-wait": ("pipeline", 1, IN_FLIGHT, (COPY, READ_STAGE)),
    "a-wait-that-leaves-one-group": ("pipeline", 2, IN_FLIGHT, (COPY, READ_STAGE)),
    "a-wait-without-a-barrier": ("pipeline", 3, f"{NO_BARRIER}|{IN_FLIGHT}", (COPY, READ_STAGE)),
    "a-copy-into-a-stage-still-read": ("pipeline", 4, f"{NO_BARRIER}|{IN_FLIGHT}", (COPY, READ_STAGE)),
    "a-store-under-a-copy": ("pipeline", 8, IN_FLIGHT, (COPY, "to[0] = 0")),
    "two-copies-to-one-place": ("pipeline", 9, IN_FLIGHT, (COPY, COPY)),
    "blocks-that-rely-on-their-order": ("sum", 5, NO_ARRIVAL, ("block > 0 ? out[block - 1]", "out[block] = (sums[0]")),
    "blocks-that-write-one-place": ("in_place", 1, NO_ARRIVAL, ("*own = 1 +", "*own = 1 +")),
    "the-first-to-arrive": ("arrival", 1, NO_ARRIVAL, (PARTIAL, LOAD_PARTIAL)),
    "no-fence-before-arriving": ("arrival", 3, NO_ARRIVAL, (PARTIAL, LOAD_PARTIAL)),
    "no-fence-after-arriving": ("arrival", 4, NO_ARRIVAL, (PARTIAL, LOAD_PARTIAL)),
    "a-fence-after-arriving-alone": ("arrival", 5, NO_ARRIVAL, (PARTIAL, LOAD_PARTIAL)),
    "one-arrives-before-the-others-have-written": ("arrival", 6, NO_ARRIVAL, (PARTIAL, LOAD_PARTIAL)),
    "load_cached-of-another-block's": ("arrival", 7, READ_ONLY, (PARTIAL, "sum += load_cached(of_block)")),
    "a-plain-load-of-another-block's": ("arrival", 8, BY_L2, (PARTIAL, "sum += *of_block")),
    "a-plain-load-of-a-counter": (
        "arrival", 9, "a counter of arrivals is for arrive alone", ("*before = arrive(", "*before += *counter")
    ),
    "load_cached-and-then-written": ("in_place", 2, READ_ONLY, ("*own = 1 +", "*own = 1 +")),
    "written-and-then-load_cached": ("in_place", 3, READ_ONLY, ("*own = 1 +", "*own = load_cached(own)")),
    "a-copy's-source-is-written": ("in_place", 4, READ_ONLY, ("*own = 1 +", "copy_async_16(shared_memory")),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SETTINGS, ids="-".join)
@pytest.mark.parametrize("mistake", RACES)
def test_a_race_is_found_under_every_schedule(executor, mistake, schedule):
    kernel, variant, rule, texts = RACES[mistake]
    executor.set(*schedule)
    assert launch(executor, kernel, variant) == LAUNCH_FAILURE
    error = executor.error()
    found = re.fullmatch(
        rf"kernel {kernel}_kernel<\(\w+\){variant}>, block \(\d+,\d+,\d+\), thread \d+ at (\S+): race: "
        r"(?:reads|writes|copies to) (?:shared memory at \d+|global memory at 0x[0-9a-f]+), which thread \d+"
        r"(?: of block \(\d+,\d+,\d+\))? (?:read|wrote|copied to|counted) at (\S+): (.*)",
        error,
    )
    assert found, error
    assert re.fullmatch(rule, found[3]), error
    occurrence = 1 if texts[0] == STAGED and kernel == "bytes" else 0
    lines = [line_of(text, occurrence if text == STAGED else 0) for text in texts]
    assert sorted(lines) == sorted(found.groups()[:2]), error


# A variant of address_kernel, and what is said of it.
ADDRESSES = {
    "past-the-end": (1, "staged[threadIdx.x + kReadsPast]", "reads 8 bytes at 1024, outside of the block's 1024 bytes"),
    "before-the-beginning": (2, "*to = *(", "writes 8 bytes at -8, outside of the block's 1024 bytes"),
    "misaligned-in-shared-memory": (3, "*to = *(", "writes 8 bytes at misaligned 0x"),
    "misaligned-in-global-memory": (4, "*to = *(", "reads 8 bytes at misaligned 0x"),
}


@pytest.mark.parametrize("mistake", ADDRESSES)
def test_a_wrong_address_is_found_where_no_function_checks_it(executor, mistake):
    variant, text, message = ADDRESSES[mistake]
    assert launch(executor, "address", variant) == LAUNCH_FAILURE
    where = rf"kernel address_kernel<\(Address\){variant}>, block \(0,0,0\), thread \d+ at {line_of(text)}"
    assert re.match(f"{where}: {message}", executor.error()), executor.error()


def test_the_next_launch_after_a_race_is_right(executor):
    for kernel, variant in (("pair", 1), ("pipeline", 1), ("arrival", 3)):
        assert launch(executor, kernel, variant) == LAUNCH_FAILURE
        assert launch(executor, kernel, 0) == 0, executor.error()
