"""Tuning from end to end: the CUDA kernels on the host executor, timed by what its log of launches says; the file."""

import ctypes
import math
import multiprocessing
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import cases
from support.cuda_backend import NAMESPACE

from nf4kernels import reference
from nf4kernels.backends import native, select, tuned_files
from nf4kernels.backends.tuned_files import Card
from nf4kernels.backends.tuned_table import ANY_ROWS, CUDA_PRODUCTS, Config, CudaOp, Table
from nf4kernels.tuning import cuda, tune
from nf4kernels.tuning import timer as timer_module
from nf4kernels.tuning.cuda import tune_cuda
from nf4kernels.tuning.products import Native, Product, Triton
from nf4kernels.tuning.search import Budget, OutOfTimeError
from nf4kernels.tuning.timer import ROUNDS, Timer
from nf4kernels.tuning.tune import Library, Machine, TuneError, check_writable, machine_of, measure, save

CARD = Card("A Test GPU", "sm_90", "1.2.3")
SHAPE = (64, 640)


class ExecutorClock:
    """The host executor's: a launch takes the time that a formula gives it."""

    device, cache_bytes = torch.device("cpu"), 1

    def __init__(self, executor, formula) -> None:
        self.executor, self.formula, self.samples = executor, formula, []

    def sampler(self, run, copies):
        self.executor.reset()
        rows = len(run())
        launches = [launch for launch in self.executor.launches() if "reduce" not in launch.kernel]
        ms = self.formula(launches[-1], rows)

        def sample() -> float:
            self.samples.append(launches[-1].kernel)
            return ms

        return sample


@pytest.fixture
def library(executor_ops):
    """The CUDA library as tuning sees it, on the host executor."""
    loaded = object.__new__(native.CudaLibrary)
    loaded.handle = executor_ops.executor.library
    library = Library(loaded, 0, 90, 4)
    yield library
    library.use({})


@pytest.fixture
def timer(executor_ops, library):
    def make(formula, **options) -> Timer:
        ops = getattr(torch.ops, NAMESPACE)
        return Timer(
            ExecutorClock(executor_ops.executor, formula),
            lambda op, candidate: (getattr(ops, op), library.running(candidate)),
            **options,
        )

    return make


def launched(executor_ops, op: str, rows: int) -> list:
    x, qweight = cases.activations(rows, SHAPE[op == "linear"], torch.bfloat16), cases.quantized(*SHAPE)
    executor_ops.executor.reset()
    getattr(executor_ops.ops, op)(x, *qweight.op_args(), *((None,) if op == "linear" else ()))
    return executor_ops.launches()


def test_what_was_measured_chooses_the_kernels_from_then_on(executor_ops, library, timer, monkeypatch, tmp_path):
    """small to 8 rows and a tile of 64 to 40, against what is predicted; then dequantize + GEMM."""
    monkeypatch.setattr(cuda, "ROWS", (1, 8, 16, 24, 40, 48))
    monkeypatch.setattr(cuda, "SHAPES", (SHAPE,))
    monkeypatch.setattr(cuda, "BLOCKS", (1,))

    def formula(launch, rows: int) -> float:
        if "linear_small" in launch.kernel:
            return 1.0 if rows <= 8 else 3.0
        if "linear_tiled" in launch.kernel:
            return 2.0 if "M64" in launch.kernel and rows <= 40 else 5.0
        return 4.0 if rows > 16 else 9.0

    found = tune_cuda(library, timer(formula), ["linear"], 1, Budget(math.inf, time.time), print)
    own = found["linear"]
    assert (own.small, own.tiled) == (8, 40)
    path = tmp_path / CARD.file_name
    save(Table(CARD.architecture, "a test", CARD.name, CARD.versions(), found), path)
    native.tune_cuda(library.library.handle, 0, tuned_files.read(path).cuda, "measured here")

    def choice(device: int, rows: int) -> tuple:
        return library.library.choice(device, False, native.BFLOAT16, rows, *SHAPE, 0, True, True, 90, 4)

    for rows, kernel, name in (
        (8, "linear_small", "small"), (9, "linear_tiled_kernel<BFloat16, LinearShape<LinearM64", "tiled"),
        (40, "linear_tiled_kernel<BFloat16, LinearShape<LinearM64", "tiled"),
        (41, "dequantize_kernel", "dequantize_gemm"),
    ):  # fmt: skip
        names = [launch.kernel for launch in launched(executor_ops, "linear", rows)]
        assert any(kernel in launched_name for launched_name in names), (rows, names)
        assert (choice(0, rows)[0], choice(0, rows)[3]) == (name, "measured here")
    assert choice(1, 9)[0] == choice(-1, 9)[0] == "small", "another device, and what is predicted"
    assert any("dgrad_tiled" in launch.kernel for launch in launched(executor_ops, "linear_dgrad", 41)), "as predicted"
    library.use({})
    assert any("linear_small" in launch.kernel for launch in launched(executor_ops, "linear", 9)), "predicted again"


@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_a_tuned_tile_and_its_blocks_are_launched(executor_ops, library, op):
    """Each tile that is near M runs where it alone is cheap, and more blocks are more splits."""
    ran = set()
    for tile, name in enumerate(library.tiles(op)):
        product = Product(op, 60, SHAPE)
        chosen = [library.choice(product, Native("tiled", tile, blocks)) for blocks in (1, 2, 4)]
        if chosen[0] is None:
            continue
        splits = [own[2] for own in chosen]
        assert splits == sorted(splits)
        for blocks, (_, number, split) in zip((1, 4), (chosen[0], chosen[-1])):
            with library.running(Native("tiled", tile, blocks)):
                (launch,) = [run for run in launched(executor_ops, op, 60) if "tiled" in run.kernel]
            tile_m, width = int(name.split("x")[0]), int(name.split("x")[1 if op == "linear" else 2])
            columns = -(-(SHAPE[0] if op == "linear" else SHAPE[1]) // width)
            assert (number, launch.grid) == (tile, (columns, -(-60 // tile_m), split))
        ran.add(tile)
        assert library.cycles(replace(product, M=2000), tile, 1) > library.cycles(product, tile, 1) > 0
        own = CudaOp(0, ANY_ROWS, Native("tiled", tile).only(library.tiles(op)).tiles)
        assert library.tile_of(product, own) == tile
    assert len(ran) >= 2


def test_a_candidate_that_cannot_run_is_none(library):
    assert library.choice(Product("linear", 17, SHAPE), Native("small")) is None
    assert library.choice(Product("linear_dgrad", 1, SHAPE), Native("small")) is None
    assert library.choice(Product("linear", 1, (64, 96)), Native("tiled")) is None
    assert library.choice(Product("grouped_linear", 17, SHAPE, 4), Native("small")) == ("small", 0, 1)


def tiles_with(own: CudaOp, **changes) -> dict:
    return {"tiles": tuple(replace(tile, **changes) for tile in own.tiles)}


def test_wrong_numbers_are_refused(executor_ops, library):
    handle = executor_ops.executor.library
    own = Native("tiled").only(library.tiles("linear"))
    for wrong in (
        {"small": -1},
        {"tiled": -1},
        {"tiles": own.tiles[::-1]},
        tiles_with(own, cost=0),
        tiles_with(own, cost=1000001),
        tiles_with(own, blocks=0),
        tiles_with(own, blocks=33),
    ):
        with pytest.raises(ValueError, match="must have "):
            native.tune_cuda(handle, 0, {"linear": replace(own, **wrong)}, "")
    descending = [replace(tile, up_to=9 - i) for i, tile in enumerate(own.tiles)]
    with pytest.raises(ValueError, match="ascending over the tiles"):
        native.tune_cuda(handle, 0, {"linear": replace(own, tiles=tuple(descending))}, "")
    with pytest.raises(ValueError, match="device from 0 to 63"):
        native.tune_cuda(handle, 64, {"linear": own}, "")
    too_few = (ctypes.c_int64 * 4)(1, 0, 1, 0)
    assert b"numbers for each tile" in handle.nf4kernels_cuda_tune(0, too_few, len(too_few), b"")
    assert library.library.choice(0, False, native.BFLOAT16, 9, *SHAPE, 0, True, True, 90, 4)[0] == "small", "as before"


def test_candidates_take_turns_and_a_wrong_one_is_not_timed(executor_ops, library, timer):
    said = []
    times = timer(lambda launch, rows: 2.0 if "small" in launch.kernel else 3.0, say=said.append)
    candidates = [Native("small"), Native("tiled")]
    product = Product("linear", 9, SHAPE)
    assert times(product, candidates, Budget(1e9, time.time)) == dict(zip(candidates, (2.0, 3.0)))
    order = ["small" in name for name in times.clock.samples]
    assert order == [True, False] * (len(order) // 2)
    right = times.product

    def wrong(op, candidate):
        function, running = right(op, candidate)
        return (lambda *arguments: function(*arguments) * 1.02) if candidate.kernel == "tiled" else function, running

    times.product = wrong
    assert times(product, candidates, Budget(1e9, time.time)) == {Native("small"): 2.0}
    assert said == [f"{product} by {Native('tiled')} is WRONG against float64, and is not used"]


def test_experts_are_timed_too(library, timer):
    times = timer(lambda launch, rows: 1.0 + ("tiled" in launch.kernel))
    for op in ("grouped_linear", "grouped_linear_dgrad"):
        assert times(Product(op, 3, SHAPE, 4), [Native("tiled")], Budget(1e9, time.time)) == {Native("tiled"): 2.0}


def test_what_the_device_refuses_is_left_out(timer):
    class TooLargeError(Exception):
        pass

    def refuse(*arguments):
        raise TooLargeError

    forgotten = []
    times = timer(lambda launch, rows: 1.0, refusals=(TooLargeError,), forget_graphs=lambda: forgotten.append(1))
    times.product = lambda op, candidate: (refuse, nullcontext())
    assert times(Product("linear", 1, SHAPE), [Native("small")], Budget(1e9, time.time)) == {}
    with pytest.raises(OutOfTimeError):
        times(Product("linear", 1, SHAPE), [Native("small")], Budget(0, time.time))
    assert len(forgotten) == 2, "after each measurement, however it ends"


class EagerClock:
    """One without graphs: a sample is a run."""

    device, cache_bytes = torch.device("cpu"), 1

    def sampler(self, run, copies):
        return lambda: run() is None or 2.0


def eager(function, said: list, **options) -> Timer:
    """By a function of the candidate that runs, which it does only within its own context."""
    running = []

    @contextmanager
    def run_as(candidate):
        running.append(candidate)
        yield
        running.pop()

    def product(op, candidate):
        def run(*arguments):
            function(running[-1] if running else None)
            return getattr(reference, op)(*arguments)

        return run, run_as(candidate)

    return Timer(EagerClock(), product, said.append, **options)


def test_without_graphs_each_sample_runs_by_its_candidate():
    ran = []
    candidates = [Native("small"), Native("tiled"), Native("dequantize_gemm")]
    product = Product("linear", 2, SHAPE)
    assert eager(ran.append, [])(product, candidates, Budget(1e9, time.time)) == dict.fromkeys(candidates, 2.0)
    assert ran == candidates + ROUNDS * candidates


@pytest.mark.parametrize("late", [False, True], ids=["at once", "in a sample"])
def test_a_candidate_that_raises_is_left_out_and_said(late):
    ran, said = [], []

    def run(candidate):
        ran.append(candidate)
        if candidate.kernel == "tiled" and ran.count(candidate) > 2 * late:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore lines")

    candidates, product = [Native("tiled"), Native("small")], Product("linear", 2, SHAPE)
    assert eager(run, said)(product, candidates, Budget(1e9, time.time)) == {Native("small"): 2.0}
    assert said == [f"{product} by {Native('tiled')} is not used: CUBLAS_STATUS_NOT_SUPPORTED"]


def test_a_product_without_memory_is_not_measured(monkeypatch):
    def allocate(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    said, times = [], eager(print, [])
    times.say = said.append
    monkeypatch.setattr(timer_module.Weights, "rows", allocate)
    product = Product("linear", 2, SHAPE)
    assert times(product, [Native("small")], Budget(1e9, time.time)) == {}
    assert said == [f"{product} is not measured: CUDA out of memory"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_no_graph_captures_is_timed_without_one(monkeypatch, fails):
    """A made-up device: a replay takes 1 ms a call, and a call 3."""
    now, streams = [0.0], []

    class Graph:
        calls = 0

        def replay(self):
            now[0] += self.calls

    class Event(SimpleNamespace):
        def record(self):
            self.time = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, last):
            return last.time - self.time

    captured = []

    @contextmanager
    def capture(graph):
        captured.append(graph)
        yield
        captured.pop()
        if fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def run():
        if captured:
            captured[-1].calls += 1
        else:
            now[0] += 3.0

    for name, value in (
        ("CUDAGraph", Graph), ("graph", capture), ("current_stream", lambda: "mine"), ("set_stream", streams.append),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    clock = object.__new__(timer_module.Clock)
    clock.device = torch.device("cuda", 0)
    clock.module = SimpleNamespace(synchronize=lambda: None, Event=lambda **options: Event())
    assert clock.sampler(run, 2)() == (3.0 if fails else 1.0)
    assert streams == ["mine"] * fails, "which a failed capture leaves another one"


def test_the_candidates_of_experts_have_the_same_rows():
    seen = []

    def product(op, candidate):
        def run(*arguments):
            seen.append(arguments[1])
            return getattr(reference, op)(*arguments)

        return run, nullcontext()

    candidates = [Native("small"), Native("tiled")]
    Timer(EagerClock(), product)(Product("grouped_linear", 3, SHAPE, 4), candidates, Budget(1e9, time.time))
    assert all(offsets is seen[0] for offsets in seen)
    assert seen[0][-1] == 12


# The table of a run.

BUCKETS = {
    op: {16: Config(16, 64, 4, 5, 1024), 65536: Config(128, 64, 8, 3, 8192)} for op in ("linear", "linear_dgrad")
}


class AnyLibrary:
    """Any candidate runs, and all tiles are predicted to be alike."""

    def tiles(self, op: str) -> list[str]:
        return ["32x128x64", "128x128x64"]

    def choice(self, product, candidate: Native):
        return candidate.kernel, candidate.tile, candidate.blocks

    def tile_of(self, product, own) -> int:
        return 0

    def cycles(self, product, tile: int, blocks: int) -> float:
        return 1000.0


LIBRARY = AnyLibrary()


class Counter:
    def __init__(self) -> None:
        self.now, self.used = 0.0, []

    def machine(self, **options) -> Machine:
        def times(product, candidates, budget):
            found = {}
            for candidate in candidates:
                budget.check()
                self.now += 0.1
                found[candidate] = 1.0 + (isinstance(candidate, Native) and candidate.kernel == "dequantize_gemm")
            return found

        return Machine(CARD, times, use=self.used.append, **options)

    def __call__(self) -> float:
        return self.now


def measured(seconds: float, quick: bool = False, **options) -> tuple[Table, Counter]:
    counter = Counter()
    return measure(counter.machine(**options), quick, Budget(seconds, counter), lambda text: None), counter


def test_a_run_fills_every_part_of_the_table():
    table, counter = measured(1e6, cuda=LIBRARY, configs=BUCKETS, gemm_from=dict.fromkeys(BUCKETS, 99))
    assert set(table.cuda) == {"linear", "linear_dgrad", "grouped_linear", "grouped_linear_dgrad"}
    assert counter.used == [table.cuda], "CUDA runs as tuned when Triton is compared with it"
    assert {op: list(own) for op, own in table.triton.items()} == {op: [16, 65536] for op in BUCKETS}
    assert set(table.dequantize_gemm_from) == set(BUCKETS)
    assert (table.card, table.architecture, table.versions) == (CARD.name, CARD.architecture, CARD.versions())
    assert Table.from_json(table.to_json()) == table
    assert table.cuda["linear"].tiled == ANY_ROWS


@pytest.mark.parametrize("seconds", [6, 20, 60, 105])
def test_a_run_ends_in_time_with_what_it_has(seconds):
    table, counter = measured(seconds, cuda=LIBRARY, configs=BUCKETS, gemm_from=dict.fromkeys(BUCKETS, 99))
    assert counter.now <= seconds + 1
    assert table.cuda or table.triton
    assert Table.from_json(table.to_json()) == table


def test_a_quick_run_measures_no_configurations():
    table, counter = measured(1e6, True, cuda=LIBRARY, configs=BUCKETS, gemm_from=dict.fromkeys(BUCKETS, 99))
    assert table.triton == {}
    assert table.cuda
    assert table.dequantize_gemm_from
    assert "--quick" in table.origin
    assert counter.now < measured(1e6, cuda=LIBRARY, configs=BUCKETS, gemm_from=dict.fromkeys(BUCKETS, 99))[1].now / 2


def test_one_backend_alone_is_measured():
    assert not measured(1e6, cuda=LIBRARY)[0].triton
    table = measured(1e6, configs=BUCKETS)[0]
    assert (table.cuda, table.rules) == ({}, ())
    assert table.triton


def test_a_run_in_which_nothing_runs_is_an_error(monkeypatch, tmp_path):
    machine, said = Machine(CARD, lambda *arguments: {}, LIBRARY, BUCKETS, dict.fromkeys(BUCKETS, 99)), []
    with pytest.raises(TuneError, match="must have time for one op at least, whose kernels run, got none"):
        measure(machine, False, Budget(1e6, Counter()), said.append)
    assert [line.partition(" stays as predicted")[0] for line in said if "stays" in line] == [
        *CUDA_PRODUCTS, "linear in Triton", "linear_dgrad in Triton",
    ]  # fmt: skip

    def broken(*arguments):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(tune, "card_of", lambda *device: CARD)
    monkeypatch.setattr(tune, "machine_of", lambda device, say: Machine(CARD, broken, LIBRARY))
    with pytest.raises(TuneError, match="must have a device that runs what is measured, got CUDA error: unspecified"):
        tune.tune(torch.device("cpu", 0), output=tmp_path / "table.json")
    assert os.listdir(tmp_path) == []


def test_no_time_at_all_is_an_error():
    with pytest.raises(TuneError, match="must have time for one op at least"):
        measured(0, cuda=LIBRARY)


# The file.


@pytest.fixture
def table():
    return measured(1e6, cuda=LIBRARY)[0]


def test_the_former_table_stays_where_a_run_is_interrupted(table, tmp_path, monkeypatch):
    path = tmp_path / "cache" / CARD.file_name
    save(table, path)
    before = path.read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "cache_path", lambda card: path)
    monkeypatch.setattr(tune, "card_of", lambda *device: CARD)
    monkeypatch.setattr(tune, "machine_of", lambda device, say: Counter().machine(cuda=LIBRARY))
    monkeypatch.setattr(tune, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(torch.device("cpu", 0))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "SECONDS", 1e9)
    written, found = tune.tune(torch.device("cpu", 0))
    assert written == path
    assert tuned_files.read(path) == found
    other, _ = tune.tune(torch.device("cpu", 0), output=tmp_path / "elsewhere.json")
    assert tuned_files.read(other).cuda == found.cuda
    into, _ = tune.tune(torch.device("cpu", 0), output=tmp_path)
    assert into == tmp_path / CARD.file_name, "into a folder, by the card's name"
    assert tuned_files.read(into).cuda == found.cuda
    monkeypatch.setattr(tune, "cache_path", lambda card: None)
    with pytest.raises(TuneError, match="must have a directory to write to, got an empty NF4KERNELS_CACHE"):
        tune.tune(torch.device("cpu", 0))


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file" / "table.json", tmp_path / "file" / "deeper" / "table.json"):
        with pytest.raises(TuneError, match=f"must write {path}, got Not a directory|got File exists"):
            check_writable(path)

    def read_only(*arguments, **options):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(tune, "replacing", read_only)
    with pytest.raises(TuneError, match=r"must write .*, got Read-only file system"):
        check_writable(tmp_path / "table.json")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TuneError, match="Permission denied"):
        check_writable(tmp_path / "table.json")


def write_over_and_over(table: Table, path: Path) -> None:
    while True:
        save(table, path)


def test_writers_at_the_same_time_leave_one_whole_table(table, tmp_path):
    """Two processes write tables of their own over and over while this one reads: it never sees part of one."""
    path, tables = tmp_path / CARD.file_name, [replace(table, origin=letter * 1000) for letter in "ab"]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_over_and_over, args=(own, path)) for own in tables]
    for writer in writers:
        writer.start()
    try:
        seen, deadline = [], time.monotonic() + 60
        while not all(own in seen for own in tables) and time.monotonic() < deadline:
            seen += [tuned_files.read(path)] if path.exists() else []
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert all(own in tables for own in seen)
    assert all(own in seen for own in tables)


# The machine.


@pytest.fixture
def made_up_gpu(executor_ops, library, interpreter, monkeypatch):
    """A GPU whose native kernels run on the host executor, and Triton's under its interpreter."""
    kernels = {"native": getattr(torch.ops, NAMESPACE), "triton": SimpleNamespace(**interpreter.backend.OPS)}
    monkeypatch.setattr(tune, "card_of", lambda *device: CARD)
    monkeypatch.setattr(tune, "Clock", lambda device: ExecutorClock(executor_ops.executor, lambda launch, rows: 2.0))
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda i: SimpleNamespace(major=9, minor=0, multi_processor_count=132))  # fmt: skip
    monkeypatch.setattr(select, "decide", lambda kind: select.Decision("native", "native sm_90a", "a card"))
    monkeypatch.setattr(select, "cuda_library", lambda: (library.library, ""))
    monkeypatch.setattr(select, "kernels_of", lambda name: {op: getattr(kernels[name], op) for op in CUDA_PRODUCTS})
    monkeypatch.setattr(select, "triton_choices", lambda: interpreter.backend.choose)
    choose = interpreter.backend.choose
    monkeypatch.setattr(choose, "architecture_of", lambda device: "sm_90")

    def has(*backends: str) -> Machine:
        monkeypatch.setattr(select, "available", lambda kind: list(backends))
        return machine_of(torch.device("cuda", 0), print)

    choose._table_on.cache_clear()
    yield has
    choose._table_on.cache_clear()  # which has the made-up GPU's table


def test_the_backends_of_a_machine_are_timed_by_name(made_up_gpu, library, interpreter, monkeypatch):
    machine = made_up_gpu("native", "triton")
    choose = interpreter.backend.choose
    assert (machine.card, machine.gemm_from) == (CARD, choose.table_for("sm_90").dequantize_gemm_from)
    assert machine.configs["linear"] == dict(choose.table_for("sm_90").configs["linear"])
    assert (machine.cuda.arch, machine.cuda.multiprocessors) == (90, 132)
    seen = []
    run = interpreter.backend.OPS["linear"]

    def recorded(*arguments):
        seen.append(dict(choose._forced))
        return run(*arguments)

    product = machine.times.product
    monkeypatch.setattr(
        machine.times, "product",
        lambda op, c: (recorded, product(op, c)[1]) if isinstance(c, Triton) else product(op, c),
    )  # fmt: skip
    monkeypatch.setattr(machine.times.clock, "sampler", lambda run, copies: run() is None or (lambda: 2.0))
    candidates = [Native(), Native("tiled"), *(Triton(path, Config(16, 32, 4, 2, 64)) for path in choose.PATHS)]
    times = machine.times(Product("linear", 3, (64, 64)), candidates, Budget(1e9, time.time))
    assert times == dict.fromkeys(candidates, 2.0)
    assert [forced["path"] for forced in seen] == ["fused", "fused", "dequantize_gemm", "dequantize_gemm"]
    assert all(forced["config"] == Config(16, 32, 4, 2, 64) for forced in seen)
    assert choose._forced == {"path": None, "config": None}


def test_a_machine_of_one_backend_has_that_alone(made_up_gpu):
    assert made_up_gpu("native").configs == {}
    machine = made_up_gpu("triton")
    assert machine.cuda is None
    assert machine.configs
    with pytest.raises(TuneError, match="must have compiled kernels or Triton on the GPU, got native sm_90a: a card"):
        made_up_gpu()
