"""The host executor of CUDA kernels itself: what it computes, and that it catches each mistake it is there for.

Every mistake is a variant of a kernel in executor/faults.cu whose correct variant passes under every setting.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from executor.build import CXX, EXECUTOR, asan_environment, build
from executor.executor import COPIES, SCHEDULES, SETTINGS, SM_86_SHARED, Executor, Launch
from executor.faults import EVERY_SETTING, NUMBERS, THREADS, aligned, arrival, line_of, pipeline, run, shift, sums
from support.paths import ROOT, python_path

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="tests/executor switches fibers in x86-64 assembly"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"tests/executor needs {CXX}"),
]

LAUNCH_FAILURE, INVALID_VALUE, INVALID_CONFIGURATION = 719, 1, 9


@pytest.fixture(scope="module")
def library():
    return build("faults", [EXECUTOR / "faults.cu"])


@pytest.fixture
def executor(library):
    executor = Executor(library)
    executor.library.error_text.restype = ctypes.c_char_p
    yield executor
    executor.set()
    executor.reset()


def caught_under(executor, settings, right) -> set:
    """The settings under which right() is False."""
    caught = set()
    for schedule, copies, seed in settings:
        executor.set(schedule, copies, seed)
        if not right():
            caught.add((schedule, copies))
    return caught


# What it computes.


@pytest.mark.parametrize(("schedule", "copies", "seed"), EVERY_SETTING)
def test_correct_kernels_are_right_under_every_setting(executor, schedule, copies, seed):
    executor.set(schedule, copies, seed)
    for by in (1, -1, 40, -40):
        np.testing.assert_array_equal(*shift(executor, 0, by))
    code, out, expected = sums(executor, grid=(3, 2, 4))
    assert code == 0
    np.testing.assert_allclose(out, expected, atol=1e-4)
    code, out, expected = pipeline(executor, 0)
    assert code == 0
    np.testing.assert_array_equal(out, expected)
    assert executor.error() == ""


# Where element i of a lane's fragment is, as the PTX ISA words it for mma.m16n8k16.
def a_position(lane, i):
    return lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8), lane % 4 * 2 + i % 2 + (0 if i < 4 else 8)


def b_position(lane, i):
    return lane % 4 * 2 + i % 2 + (0 if i < 2 else 8), lane // 4


def c_position(lane, i):
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + i % 2


def fragments(matrix, position, count):
    """[lane, count]: each lane's elements of the matrix."""
    return torch.stack([torch.stack([matrix[position(lane, i)] for i in range(count)]) for lane in range(32)])


def mma(executor, a, b, c, variant=0):
    d = np.zeros(c.shape, np.float32)
    words = [t.contiguous().view(torch.int16).numpy() for t in (a, b)]
    return run(executor, "mma", a.dtype == torch.bfloat16, variant, *words, c.numpy(), d), d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_follows_the_fragment_layouts(executor, dtype):
    for _ in range(5):
        a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
        expected = c.double() + a.double() @ b.double()
        # 16 sums, each rounded once to fp32.
        bound = 16 * 2.0**-24 * (c.abs().double() + a.abs().double() @ b.abs().double())
        lanes = fragments(a, a_position, 8), fragments(b, b_position, 4), fragments(c, c_position, 4)
        code, d = mma(executor, *lanes, variant=4)
        assert code == 0
        assert (abs(torch.from_numpy(d) - fragments(expected, c_position, 4)) <= fragments(bound, c_position, 4)).all()
        code, d = mma(executor, a, b.T, c)
        assert code == 0
        assert (abs(torch.from_numpy(d) - expected) <= bound).all()


def test_mma_lets_nan_touch_its_row_or_column_only(executor):
    a, b, c = torch.ones(16, 16).half(), torch.ones(16, 8).half(), torch.zeros(16, 8)
    a[3, 5] = b[2, 6] = torch.nan
    _, d = mma(executor, a, b.T, c)
    expected = np.zeros((16, 8), bool)
    expected[3, :] = expected[:, 6] = True
    np.testing.assert_array_equal(np.isnan(d), expected)


def test_shuffle_reads_the_lane_modulo_32_of_its_warp(executor):
    rng = np.random.default_rng(0)
    values, lanes = rng.integers(0, 2**32, THREADS, np.uint32), rng.integers(0, 64, THREADS, np.int32)
    out = np.zeros(2 * THREADS, np.uint32)
    assert run(executor, "shuffle", values, lanes, out) == 0
    warp = np.arange(THREADS) // 32 * 32
    np.testing.assert_array_equal(out[:THREADS], values[warp + lanes % 32])
    np.testing.assert_array_equal(out[THREADS:], values[warp + 5])


def test_permute_bytes_and_products_of_pairs(executor):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, THREADS), np.uint32)
    selector = rng.integers(0, 2**16, THREADS, np.uint32) & 0x7777
    out = np.zeros((3, THREADS), np.uint32)
    assert run(executor, "numbers", a, b, selector, out) == 0
    eight = np.stack([a, b], 1).view(np.uint8)  # little-endian: bytes 0 to 7
    chosen = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 7
    np.testing.assert_array_equal(out[0], np.take_along_axis(eight, chosen, 1).copy().view(np.uint32)[:, 0])
    for row, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        left, right, product = (torch.from_numpy(x.copy().view(np.int16)).view(dtype) for x in (a, b, out[row]))
        torch.testing.assert_close(product, left * right, rtol=0, atol=0, equal_nan=True)


def test_permute_bytes_refuses_sign_replication(executor):
    words = np.zeros(3 * THREADS, np.uint32)
    assert run(executor, "numbers", words, words, words + 0x10, words.copy()) == 0
    assert run(executor, "numbers", words, words, words + 0x80, words.copy()) == LAUNCH_FAILURE
    assert "permute_bytes must have a selector without bits 3, got 0x80" in executor.error()


def test_launches_are_logged_by_name_and_shape(executor):
    sums(executor, grid=(3, 2, 4))
    sums(executor, grid=(3, 2, 4))
    mma(executor, torch.ones(16, 16).bfloat16(), torch.ones(8, 16).bfloat16(), torch.ones(16, 8))
    assert sorted(executor.launches()) == [
        Launch("mma_kernel<BFloat16, (Mma)0>", (1, 1, 1), 32, 0, 1),
        Launch("sum_kernel<(Sum)0>", (3, 2, 4), THREADS, 16, 2),
    ]
    sums(executor, 3)  # fails
    assert len(executor.launches()) == 2
    executor.reset()
    assert executor.launches() == []


def test_launches_that_a_device_refuses(executor):
    assert run(executor, "empty", 1, 1, 1, 1024, 227 << 10) == 0
    assert run(executor, "empty", 1, 1, 1, 1024, (227 << 10) + 1) == INVALID_VALUE
    assert (
        "kernel empty_kernel: at most 232448 bytes of shared memory, got grid 1,1,1 threads 1024 shared 232449"
        in executor.error()
    )
    executor.set(shared_limit=SM_86_SHARED)
    assert run(executor, "empty", 1, 1, 1, 32, 99 << 10) == 0
    assert run(executor, "empty", 1, 1, 1, 32, 100 << 10) == INVALID_VALUE
    for shape in ((0, 1, 1, 32), (1, 0, 1, 32), (1, 1, 65536, 32), (1, 1, 1, 0), (1, 1, 1, 1025)):
        assert run(executor, "empty", *shape, 0) == INVALID_CONFIGURATION, shape


def test_settings_are_checked(executor):
    with pytest.raises(ValueError, match=r"schedule must be one of .*, got backwards"):
        executor.set("backwards")


def test_a_library_is_built_anew_only_when_a_source_changed(tmp_path, monkeypatch, request):
    source = tmp_path / "one.cu"
    source.write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }', encoding="utf-8")
    name = f"one-{os.getpid()}"
    request.addfinalizer(lambda: shutil.rmtree(ROOT / "build" / "executor" / name))
    first = build(name, [source])
    with monkeypatch.context() as patch:
        patch.setattr("executor.build._run", lambda *_: pytest.fail("compiled again"))
        assert build(name, [source]) == first
    source.write_text(source.read_text(encoding="utf-8").replace("1", "2"), encoding="utf-8")
    assert ctypes.CDLL(str(build(name, [source]))).one() == 2
    source.write_text("int one() { return nothing; }", encoding="utf-8")
    with pytest.raises(RuntimeError, match="was not declared"):
        build(name, [source])


def test_processes_that_build_at_once_compile_once(tmp_path, request):
    compiler, log, source = tmp_path / "compiler", tmp_path / "log", tmp_path / "one.cu"
    touches = 'while [ $# -gt 1 ]; do [ "$1" = -MF ] && touch "$2"; shift; done; touch "$1"'
    compiler.write_text(f"#!/bin/sh\necho x >> {log}\nsleep 0.2\n{touches}\n", encoding="utf-8")
    compiler.chmod(0o755)
    source.touch()
    name = f"locked-{os.getpid()}"
    request.addfinalizer(lambda: shutil.rmtree(ROOT / "build" / "executor" / name))
    script = f"from pathlib import Path; from executor.build import build; build({name!r}, [Path({str(source)!r})])"
    env = os.environ | python_path() | {"CXX": str(compiler)}
    processes = [subprocess.Popen([sys.executable, "-c", script], env=env) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    compiled = [*EXECUTOR.glob("*.cpp"), source]
    assert len(log.read_text(encoding="utf-8").splitlines()) == len(compiled) + 1, "each once, and the link"


# That it can fail: barriers and memory.


@pytest.mark.parametrize("variant", [1, 2], ids=["none", "of-the-warp"])
def test_a_missing_barrier_is_caught(executor, variant):
    """A thread that reads upwards meets NaN if the lower go first, and the reverse: one schedule is not enough."""
    for by, schedule, other in ((1, "ascending", "descending"), (-1, "descending", "ascending")):
        caught = caught_under(executor, EVERY_SETTING, lambda by=by: np.array_equal(*shift(executor, variant, by)))
        assert (schedule, "late") in caught
        assert (other, "late") not in caught
        assert ("random", "late") in caught


def test_blocks_that_rely_on_their_order_are_caught(executor):
    def right():
        code, out, expected = sums(executor, 5, grid=(8, 1, 1))
        assert code == 0
        return np.allclose(out, expected.cumsum(), atol=1e-3)

    assert {schedule for schedule, _ in caught_under(executor, EVERY_SETTING, right)} == {"descending", "random"}


def test_the_last_block_to_arrive_adds_in_order_and_the_counter_is_zero_again(executor):
    def right(variant):
        code, out, expected, counter = arrival(executor, variant)
        assert (code, counter) == (0, 0)
        return np.array_equal(out, expected)

    assert not caught_under(executor, EVERY_SETTING, lambda: right(0))
    assert len(caught_under(executor, EVERY_SETTING, lambda: right(1))) == len(SETTINGS)


def test_shared_memory_never_written_is_nan(executor):
    out, expected = shift(executor, 3, 0)
    np.testing.assert_array_equal(out[: THREADS // 2], expected[: THREADS // 2])
    assert np.isnan(out[THREADS // 2 :]).all()


def test_every_block_begins_with_poisoned_memory(executor):
    out = np.zeros(THREADS, np.uint32)
    for _ in range(2):  # shared words as they are before anything is written
        assert run(executor, "read", 3, THREADS, 4 * THREADS, NUMBERS, out) == 0
        assert (out == 0xFFFFFFFF).all()


def test_a_wrong_fragment_index_is_caught(executor):
    a, b, c = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.randn(16, 8)
    expected = (c + a.float() @ b.float()).numpy()
    for variant, right in ((0, True), (1, False), (2, False)):
        code, d = mma(executor, a, b.T, c, variant)
        assert code == 0
        assert np.allclose(d, expected, atol=1e-4) == right


# That it can fail: collectives to which not all come.

# A variant of sum_kernel, and the two lines at which its threads are when it ends.
DIVERGENT = {
    "shuffle-in-a-branch": (1, "shuffle_xor", "sum += shuffle_xor(sum, 16);", (0, 1)),
    "barrier-in-a-branch-of-a-warp": (2, "sync_block", "sync_block();", (1, 3)),
    "two-barriers-of-one-block": (4, "sync_block", "sync_block();", (2, 3)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", DIVERGENT)
def test_divergent_collectives_are_caught(executor, schedule, case):
    variant, what, text, occurrences = DIVERGENT[case]
    executor.set(schedule)
    code, _, _ = sums(executor, variant)
    assert code == LAUNCH_FAILURE
    error = executor.error()
    assert re.match(
        rf"kernel sum_kernel<\(Sum\){variant}>, block \(0,0,0\), thread \d+ at faults.cu:\d+: divergent: ", error
    )
    for occurrence in occurrences:
        assert f"wait at {what} ({line_of(text, occurrence)})" in error


def test_an_early_exit_before_a_barrier_is_caught(executor):
    assert sums(executor, 3, grid=(2, 1, 1))[0] == LAUNCH_FAILURE
    assert executor.error() == (
        "kernel sum_kernel<(Sum)3>, block (0,0,0): deadlock: threads 64-95 have exited;"
        f" threads 0-63, 96-127 wait at sync_block ({line_of('sync_block();', 3)})"
    )
    assert executor.library.error_text(LAUNCH_FAILURE).decode() == executor.error()


def test_a_collective_without_a_whole_warp_is_caught(executor):
    ones = torch.ones(16, 16).half()
    assert mma(executor, ones, ones[:8], torch.ones(16, 8), variant=3)[0] == LAUNCH_FAILURE
    assert (
        f"threads 16-31 have exited; threads 0-15 wait at mma_16x8x16 ({line_of('mma_16x8x16<T>(')})"
        in executor.error()
    )


def test_the_next_launch_after_an_error_is_right(executor):
    for variant in (1, 3, 2):
        assert sums(executor, variant, grid=(4, 1, 1))[0] == LAUNCH_FAILURE
        code, out, expected = sums(executor, grid=(4, 1, 1))
        assert code == 0
        np.testing.assert_allclose(out, expected, atol=1e-4)


# That it can fail: copies in the background, addresses.

# A variant of pipeline_kernel, and the settings that show its mistake.
LATE = {(schedule, "late") for schedule in SCHEDULES}
PIPELINE_MISTAKES = {
    "no-wait": (1, LATE),
    "a-wait-that-leaves-one-group": (2, LATE),
    "no-barrier": (3, set(SETTINGS)),
    "a-copy-into-a-stage-still-read": (4, {("ascending", "early")}),
    "a-store-under-a-copy": (8, {(schedule, "early") for schedule in SCHEDULES}),
}


@pytest.mark.parametrize("mistake", PIPELINE_MISTAKES)
def test_a_mistake_in_a_pipeline_is_caught(executor, mistake):
    variant, settings = PIPELINE_MISTAKES[mistake]

    def right():
        code, out, expected = pipeline(executor, variant)
        assert code == 0, executor.error()
        return np.array_equal(out, expected)

    caught = caught_under(executor, EVERY_SETTING, right)
    assert settings <= caught
    if variant != 3:  # one mode of copies alone would not do
        assert {copies for _, copies in caught} == {copies for _, copies in settings}


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (5, "exits without having waited for this copy_async_16"),
        (6, "copy_async_16 to misaligned 0x"),
        (7, "copy_async_16 to an address outside shared memory"),
    ],
)
def test_a_bad_copy_is_an_error(executor, copies, variant, message):
    executor.set(copies=copies)
    assert pipeline(executor, variant)[0] == LAUNCH_FAILURE
    where = rf"block \(0,0,0\), thread \d+ at {line_of('copy_async_16(to')}: "
    assert re.match(rf"kernel pipeline_kernel<\(Pipeline\){variant}>, {where}{message}", executor.error())


def test_a_copy_from_a_misaligned_address_is_an_error(executor):
    out = np.zeros(THREADS, np.float32)
    assert run(executor, "pipeline", 0, aligned(5 * THREADS + 1, np.float32)[1:], out, 5) == LAUNCH_FAILURE
    assert "copy_async_16 of 16 bytes at misaligned 0x" in executor.error()


@pytest.mark.parametrize(("variant", "what"), [(0, "load_streamed"), (1, "load_cached"), (2, "store_streamed")])
def test_a_misaligned_vector_is_an_error(executor, variant, what):
    source, out = aligned(132, np.uint32), aligned(132, np.uint32)
    source[:] = np.arange(132)
    assert run(executor, "read", variant, 32, 0, source[4:], out) == 0
    np.testing.assert_array_equal(out[:128], source[4:])
    assert (
        run(executor, "read", variant, 32, 0, *((source, out[1:]) if variant == 2 else (source[1:], out)))
        == LAUNCH_FAILURE
    )
    assert f": {what} of 16 bytes at misaligned 0x" in executor.error()
    assert executor.error().startswith(
        f"kernel read_kernel<uint4, (Read){variant}>, block (0,0,0), thread 0 at faults.cu"
    )


def test_shared_memory_read_as_global_is_an_error(executor):
    assert run(executor, "read", 4, 32, 128, NUMBERS, np.zeros(32, np.uint32)) == LAUNCH_FAILURE
    assert "load_cached of shared memory" in executor.error()


# AddressSanitizer.

OVERRUN = """
import sys
from pathlib import Path
import numpy
from executor.executor import Executor
from executor.faults import EVERY_SETTING, pipeline, run, shift, sums

executor = Executor(Path(sys.argv[1]))
for setting in EVERY_SETTING:  # nothing is reported of what is right
    executor.set(*setting)
    for by in (1, -1):
        assert numpy.array_equal(*shift(executor, 0, by))
    assert sums(executor, grid=(2, 2, 2))[0] == 0
    assert sums(executor, 3)[0] == 719
    code, out, expected = pipeline(executor, 0)
    assert code == 0 and numpy.array_equal(out, expected)
source, out, longer = (numpy.zeros(count, numpy.uint32) for count in (128, 128, 132))
assert run(executor, "read", 1, 32, 0, source, out) == 0
assert run(executor, "read", 2, 32, 0, source, out) == 0
assert run(executor, "read", 3, 32, 32 * 4, source, out) == 0
assert run(executor, "pipeline", 0, source, out, 1) == 0
print("correct", flush=True)
exec(sys.argv[2])
print("unnoticed", flush=True)
"""


@pytest.fixture(scope="module")
def asan_library():
    return build("faults", [EXECUTOR / "faults.cu"], asan=True)


@pytest.mark.parametrize(
    ("call", "report"),
    [
        ("run(executor, 'read', 1, 33, 0, source, longer)", "READ"),
        ("run(executor, 'read', 2, 33, 0, longer, out)", "WRITE"),
        ("run(executor, 'read', 3, 33, 32 * 4, source, out)", "READ"),
        ("run(executor, 'pipeline', 0, source[4:], out, 1)", "READ"),
    ],
    ids=["global-read", "global-written", "shared", "copied-in-the-background"],
)
def test_an_access_out_of_bounds_is_caught_by_address_sanitizer(asan_library, call, report):
    env = os.environ | asan_environment() | python_path()
    result = subprocess.run(
        [sys.executable, "-c", OVERRUN, str(asan_library), call],
        env=env,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.stdout == "correct\n", result.stderr[-3000:]
    assert result.returncode != 0
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert f"{report} of size" in result.stderr
    assert "_kernel" in result.stderr
