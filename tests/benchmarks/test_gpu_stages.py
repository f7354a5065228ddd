"""The checks that `make gpu` makes of the kernels: on the host executor, or by fakes of what a GPU does."""

import itertools
import math
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import capture, exact, streams, versions
from benchmarks.gpu.exact import Forced
from benchmarks.gpu.records import NOTE, OK, REFUSED, WRONG, Records
from nf4kernels import reference
from nf4kernels.backends import native

TINY = {"shapes": ((40, 192),), "rows": (5,), "codebooks": ("nf4",)}
TILES = {"linear": ["32x64x128", "128x128x64"], "linear_dgrad": ["16x128x128"]}


def forcing(executor_ops):
    return partial(native.running_kernel, executor_ops.executor.library)


def some(op: str, **sizes):
    return [case for case in exact.cases("cpu", **{**TINY, **sizes}) if case.op == op][:1]


class Fake:
    """Ops of the reference, whose kernels are forced in name only; what a forced one does can be set."""

    def __init__(self, changed=None) -> None:
        self.now, self.changed = None, changed or (lambda forced, result: result)

    def __getattr__(self, op):
        return lambda *args: self.changed(self.now, getattr(reference, op)(*args))

    @contextmanager
    def force(self, kernel, tile=-1, splits=0):
        self.now = Forced(kernel, tile, splits)
        yield


def checked(fake: Fake, op: str = "linear", **settings) -> Records:
    records = Records("exact")
    exact.check(fake, TILES, fake.force, records, some(op), splits=(0, 2), **settings)
    return records


def test_every_kernel_tile_and_split_of_the_executor_is_exact(executor_ops):
    tiles = {op: native.cuda_tiles(executor_ops.executor.library, op) for op in exact.OPS[:2]}
    records = Records("exact")
    for op, codebook in itertools.product(exact.OPS, exact.CODEBOOKS):
        cases = some(op, codebooks=(codebook,))
        exact.check(executor_ops.ops, tiles, forcing(executor_ops), records, cases, splits=(0, 2))
    assert records.wrong == 0
    assert records.counts[OK] > 2 * sum(map(len, tiles.values())), str(records)
    ran = {launch.kernel.partition("<")[0] for launch in executor_ops.launches()}
    assert {"linear_small_kernel", "linear_tiled_kernel", "linear_dgrad_tiled_kernel",
            "grouped_linear_tiled_kernel", "grouped_linear_dgrad_tiled_kernel"} <= ran  # fmt: skip
    names = {launch.kernel for launch in executor_ops.launches() if launch.kernel.startswith("linear_tiled")}
    assert len(names) == 2 * len(tiles["linear"]), "each tile has a kernel for each of the two kinds of scales"


def test_every_tile_and_split_is_a_way():
    found = list(exact.ways("linear", TILES, splits=(0, 2)))
    assert [exact.name_of(forced) for forced in found] == [
        "any", "dequantize_gemm", "small",
        "tiled tile 0", "tiled tile 0 2 splits", "tiled tile 1", "tiled tile 1 2 splits",
    ]  # fmt: skip
    assert [exact.name_of(forced) for forced in exact.ways("grouped_linear_dgrad", TILES)] == [
        "any", "dequantize_gemm", "tiled tile 0",
    ]  # fmt: skip


@pytest.mark.parametrize("op", exact.OPS)
def test_a_kernel_that_is_wrong_is_recorded_by_name(op, capsys):
    def wrong(forced, result):
        return result * 1.02 if forced == Forced("tiled", 0, 0) else result

    assert checked(Fake(), op).wrong == 0
    assert checked(Fake(wrong), op).wrong == 1
    assert f"WRONG: {op} nf4 bfloat16 40x192 M=5, tiled tile 0: " in capsys.readouterr().out


def test_one_row_of_many_that_is_wrong_shows(capsys):
    """Its error is 2% of one in 130 rows: too small for one norm of them all."""

    def wrong(forced, result):
        if forced == Forced("tiled", 0, 0):
            result[77] *= 1.02
        return result

    records, cases = Records("exact"), some("linear", rows=(130,))
    fake = Fake(wrong)
    exact.check(fake, TILES, fake.force, records, cases, splits=(0,))
    assert records.wrong == 1
    assert "row 77 has error" in capsys.readouterr().out


def test_an_element_that_no_kernel_wrote_is_nan(capsys):
    """Though torch is not to be deterministic elsewhere."""

    def forgets(forced, result):
        out = torch.empty_like(result)
        out[:, 1:] = result[:, 1:]
        return out

    torch.use_deterministic_algorithms(False)
    records = checked(Fake(forgets))
    assert not torch.are_deterministic_algorithms_enabled()
    assert records.wrong == sum(records.counts.values()) > 0
    assert ": NaN" in capsys.readouterr().out


def test_a_kernel_that_gives_other_bits_the_second_time_is_wrong(capsys):
    seen = []

    def unsteady(forced, result):
        seen.append(forced)
        again = seen.count(forced) == 2 and forced.kernel in ("small", "any")
        return torch.nextafter(result, torch.full_like(result, torch.inf)) if again else result

    records = checked(Fake(unsteady))
    assert records.wrong == 2
    assert "a second run gave other bits" in capsys.readouterr().out


def test_a_refusal_is_no_fault_and_any_other_error_ends_the_check():
    def refuses(forced, result):
        if forced.splits:
            raise RuntimeError("the forced kernel small cannot run this: a split would have no step")
        return result

    records = checked(Fake(refuses))
    assert (records.wrong, records.counts[REFUSED]) == (0, 2)

    def fails(forced, result):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        checked(Fake(fails))


def test_when_time_is_out_the_check_says_what_is_missing():
    records = checked(Fake(), has_time=lambda: False)
    assert (records.counts[OK], records.counts[REFUSED]) == (0, 1)


# Capture into a graph.


def eager_capture(run):
    """A graph that calls the function again, into the same result."""
    result = run().clone()
    return result, lambda: result.copy_(run())


def stale_capture(run):
    """A graph that took the values of its inputs."""
    result, kept = run().clone(), run().clone()
    return result, lambda: result.copy_(kept)


def test_every_capture_is_replayed_with_other_inputs():
    records = Records("capture")
    for case in capture.runs("cpu", (64, 128)):
        capture.check(case, "cpu", eager_capture, records, (64, 128))
    assert (records.counts[OK], records.wrong) == (len(capture.runs("cpu")), 0)
    stale = Records("capture")
    for case in capture.runs("cpu", (64, 128)):
        capture.check(case, "cpu", stale_capture, stale, (64, 128))
    assert stale.wrong == len(capture.runs("cpu"))


def test_a_capture_that_is_refused_is_a_fault_of_ours_and_not_of_cublas():
    def refused(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    def verdict(case: str, **settings) -> str:
        records = Records("capture")
        assert capture.check(case, "cpu", refused, records, (64, 128), **settings) in (WRONG, REFUSED)
        return WRONG if records.wrong else REFUSED

    assert [verdict(case) for case in ("linear", "lora", "dense")] == [WRONG, WRONG, REFUSED]
    assert [verdict(case, may_refuse=True) for case in ("linear", "lora", "dense")] == [WRONG, REFUSED, REFUSED]
    assert [verdict(case, is_warm=True) for case in capture.ENDS_IN_CUBLAS] == [WRONG] * 3


def process(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize(("dense", "failed"), [(OK, 0), (REFUSED, 0), (WRONG, 1)])
def test_what_ends_in_cublas_may_be_refused_where_torch_is(dense, failed):
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        started.append(arguments)
        return process(f"raise SystemExit({capture.STATUS[dense if arguments == ('--case', 'dense') else OK]})")

    assert capture.check_each(start, Records("capture")) == failed
    assert started[0] == ("--case", "dense"), "the others are told how it ended"
    assert len(started) == len(set(started)) == len(capture.runs("cpu")) + len(capture.ENDS_IN_CUBLAS)
    for arguments in started[1:]:
        assert ("--may-refuse" in arguments) == (dense == REFUSED and "--warm" not in arguments)
    assert {arguments[1] for arguments in started if "--warm" in arguments} == set(capture.ENDS_IN_CUBLAS)


def test_all_captures_have_a_time_together():
    records = Records("capture")
    assert capture.wait_for({"right": process("pass"), "refused": process("raise SystemExit(11)")}, records) == 0
    assert capture.wait_for({"wrong": process("raise SystemExit(10)")}, records) == 1, "which it has recorded itself"
    assert records.wrong == 0
    slow = {name: process("import time; time.sleep(60)") for name in ("slow", "slower")}
    begin = time.monotonic()
    crashed = {"crash": process("import sys; sys.exit(139)"), "killed": process("import os; os.abort()")}
    assert capture.wait_for({**slow, **crashed}, records, seconds=0.5) == 1
    assert time.monotonic() - begin < 5
    assert records.wrong == 4


# Two streams.


def at_once(what: str, some: list[streams.Product], right=None, repetitions: int = 4) -> Records:
    records = Records("streams")
    right = right or streams.alone(some, lambda: None)
    streams.check(what, some, right, [nullcontext] * 2, lambda: None, records, repetitions)
    return records


def faked(call) -> list[streams.Product]:
    """Two products; `call` gets the number of one and its input."""
    return [
        streams.Product(partial(call, i), tuple(torch.full((4,), 10.0 * i + j) for j in range(streams.INPUTS)))
        for i in range(2)
    ]


def test_products_of_two_streams_have_the_bits_that_they_have_alone(executor_ops):
    for M, forced in ((5, Forced("small")), (5, Forced("tiled", 0, 2))):
        some = streams.products(executor_ops.ops, "cpu", M, (64, 2048))
        with forcing(executor_ops)(*forced):
            assert at_once(exact.name_of(forced), some).counts[OK] == 1
    ran = {launch.kernel.partition("<")[0] for launch in executor_ops.launches()}
    assert {"linear_small_kernel", "linear_tiled_kernel"} <= ran


def test_the_products_of_two_streams_are_split(executor_ops):
    """By every kernel, at the shape and rows that a GPU runs, on a large card, which has room for both."""
    executor_ops.pretend(90, 132)
    library = executor_ops.executor.library
    tile_n = int(native.cuda_tiles(library, "linear")[0].split("x")[1])
    for M, forced in streams.FORCED:
        one, _ = streams.products(executor_ops.ops, "cpu", M)
        executor_ops.executor.reset()
        with forcing(executor_ops)(*forced), executor_ops.executor.planning():
            one.call(one.inputs[0])
        (launch,) = executor_ops.launches()
        columns = library.nf4kernels_cuda_small_tile_n(M) if forced.kernel == "small" else tile_n
        assert streams.SHAPE[0] // columns < math.prod(launch.grid) <= 132 // 2, f"{forced}: {launch}"


def test_a_workspace_that_two_streams_share_shows():
    workspace = torch.zeros(4)
    assert at_once("own", faked(lambda i, x: x + 1)).counts[OK] == 1
    assert at_once("sharing", faked(lambda i, x: workspace.add_(x).clone())).wrong == 1


def test_results_are_compared_and_not_the_memory_that_they_are_in():
    """As a graph's are, which all lie in one tensor."""
    results = [torch.empty(4), torch.empty(4)]
    assert at_once("right", faked(lambda i, x: results[i].copy_(x))).counts[OK] == 1
    right = streams.alone(faked(lambda i, x: results[i].copy_(x)), lambda: None)
    assert at_once("stale", faked(lambda i, x: results[i]), right).wrong == 1
    assert at_once("the other's", faked(lambda i, x: results[0].copy_(x) if i else results[0]), right).wrong == 1


def test_a_replay_that_leaves_a_part_of_its_result_shows():
    def graph(written: slice):
        def call(i, new):
            x, result = torch.empty(4), expected[i][0].clone()
            return streams.replaying(lambda: result[written].copy_(x[written]), x, result)(new)

        return faked(call)

    expected = streams.alone(faked(lambda i, x: x), lambda: None)
    assert at_once("whole", graph(slice(4)), expected).counts[OK] == 1
    assert at_once("a part", graph(slice(3)), expected, repetitions=1).wrong == 1


# Versions.


def test_versions_say_what_is_there_and_what_is_missing():
    card = SimpleNamespace(name="A card", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30,
                           L2_cache_size=50 << 20)  # fmt: skip
    answers = {
        "nvidia-smi": ", ".join(f"value {i}" for i in range(len(versions.FACTS))),
        "nvcc": "Cuda compilation tools, release 13.0, V13.0.88\n",
    }
    found = dict(versions.facts(card, lambda program, *rest: answers[program]))
    assert found["card"] == "A card"
    assert found["driver_version"] == "value 0"
    assert found["nvcc"] == "13.0.88"
    assert found["torch"].startswith(torch.__version__)
    missing = dict(versions.facts(card, lambda *command: versions.MISSING))
    assert (missing["nvidia-smi"], missing["nvcc"]) == ("missing", "missing")
    assert versions.ask("no-such-program") == versions.MISSING
    assert versions.ask(sys.executable, "-c", "print('here')") == "here\n"


def test_a_note_is_no_check():
    records = Records("versions")
    records.add("card", NOTE, "A card")
    assert (records.wrong, str(records)) == (0, "1 note")
    records.add("case", WRONG, "it is")
    assert records.wrong == 1
