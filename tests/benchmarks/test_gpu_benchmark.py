"""make gpu without a GPU: its stages, and its benchmark on the CPU with the CPU's clock at tiny shapes."""

import re
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support import triton_interpreter

import nf4kernels as nf4
from benchmarks import harness
from benchmarks.gpu import cuda_report
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import predictions as gpu_predictions
from benchmarks.gpu import run as gpu
from benchmarks.gpu import sanitize as gpu_sanitize
from benchmarks.gpu import tests as gpu_tests
from benchmarks.harness import BNB_DQ, DENSE, OURS, Row
from benchmarks.report import goals
from benchmarks.report import tables as report
from benchmarks.shapes import ExpertsShape
from nf4kernels.backends import measured

SHAPES, EXPERTS = ((128, 128), (64, 256)), ExpertsShape(6, 6, 64, 128)
TOKENS = (1, 16)
GROUPED_ROWS = (6, 96)  # each token goes through all six experts


class Cpu:
    """What gpu_measure.Cuda is, for the CPU; each sample is one call."""

    device = torch.device("cpu")
    name, arch, sms, ghz, is_hbm = "A Test GPU", "sm_90a", 132, 1.7, True
    cache_bytes, copy_bytes, gemm_size = 20_000, 1 << 16, 64

    def sampler(self, run, copies, graph=True):
        run()

        def sample() -> float:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3

        return sample

    def temporary_mib(self, run) -> float:
        return 0.0

    def between_shapes(self) -> None:
        pass


class Force:
    """Records which kernel was forced while something ran."""

    def __init__(self, refuses: tuple[str, ...] = ()) -> None:
        self.now, self.seen, self.refuses = None, set(), refuses

    @contextmanager
    def __call__(self, kernel: str):
        if kernel in self.refuses:
            raise RuntimeError(f"the forced kernel {kernel} cannot run this: too many rows")
        self.now = kernel
        self.seen.add(kernel)
        yield
        self.now = None


def new_run(seconds: float = 1000.0, **settings) -> gpu_measure.Run:
    return gpu_measure.Run(Cpu(), settings.pop("force", Force()), time.perf_counter() + seconds, 0.0, **settings)


@pytest.fixture(scope="module")
def finished():
    """One whole run at tiny shapes, Triton's kernels under its interpreter."""
    triton_interpreter.correct()
    run = new_run()
    run.measure_limits()
    gpu_measure.measure(run, SHAPES, rows=(1, 64, 512), experts=EXPERTS, tokens=TOKENS)
    return run


@pytest.fixture
def found(finished) -> dict[tuple, Row]:
    return {(row.op, row.shape, row.M): row for row in finished.rows}


def row_of_triton(op: str, M: int, ratio: float, shape: str = "8x8") -> Row:
    return Row(op, shape, M, 1, "out", {OURS: 1.0, gpu_measure.TRITON: ratio}, {gpu_measure.TRITON: (ratio,) * 3})


def test_the_lines_for_measured_csv_give_each_backend_its_rows(tmp_path):
    rows = [
        row_of_triton("linear", M, ratio, shape)
        for M, ratio in ((1, 1.5), (16, 0.5), (64, 0.9), (512, 0.96), (8192, 2.0))
        for shape in ("8x8", "16x8")
    ]
    rows += [row_of_triton("grouped dgrad", 8, 0.2), row_of_triton("lora step", 8, 0.2)]
    rows += [row_of_triton("linear_dgrad", 8, 0.8), row_of_triton("linear_dgrad", 8, 1.6, "16x8")]
    lines = list(gpu_measure.backend_lines(rows, Cpu()))
    assert lines == [
        "sm_90,linear,bfloat16,1,native,triton 1.50 of native's time at M=1 on A Test GPU",
        "sm_90,linear,bfloat16,64,triton,triton 0.90 of native's time at M=64 on A Test GPU",
        "sm_90,grouped_linear_dgrad,bfloat16,8,triton,triton 0.20 of native's time at M=8 on A Test GPU",
    ]
    table = tmp_path / "measured.csv"
    table.write_text("\n".join([measured.MEASURED.read_text().strip(), *lines, ""]))
    rules = [(rule.op, rule.rows, rule.backend) for rule in measured.rules_for("sm_90", table)]
    assert rules == [("linear", 1, "native"), ("grouped_linear_dgrad", 8, "triton"), ("linear", 64, "triton")]


def test_every_op_is_measured_beside_its_peers(finished, found):
    assert finished.wrong == 0, finished.said
    assert finished.skipped == 0
    shapes = [f"{N}x{K}" for N, K in SHAPES]
    expected = {("quantize", s, None) for s in shapes} | {("dequantize out=", s, None) for s in shapes}
    expected |= {(op, s, M) for op in ("linear", "linear_dgrad") for s in shapes for M in (1, 64, 512)}
    expected |= {("lora step", s, 512) for s in shapes}
    expected |= {(f"grouped {op}", "64x128", rows) for op in ("linear", "dgrad") for rows in GROUPED_ROWS}
    assert set(found) == expected
    for row in found.values():
        assert all(ms > 0 for ms in row.ms.values())
        assert row.share[1] > 0
        if gpu_measure.bnb is not None and row.op != "dequantize out=":  # bitsandbytes has no `out` on the CPU
            assert BNB_DQ in row.ratios
        if row.op.startswith(("l", "g")):
            assert DENSE in row.ratios
    assert all(
        gpu_measure.TRITON in row.ratios for row in found.values() if row.op in ("quantize", "linear", "linear_dgrad")
    )
    assert goals.WITHOUT_LORA in found["lora step", "128x128", 512].ratios


def test_every_kernel_is_forced_where_it_is_worth_its_time(finished, found):
    assert finished.force.seen == set(gpu_measure.KERNELS)
    kernels = {side for side in found["linear", "128x128", 1].ms if side.startswith(gpu_measure.FORCED)}
    assert kernels == {"kernel small", "kernel tiled", "kernel dequantize_gemm", "kernel any"}
    assert "kernel small" not in found["linear", "128x128", 64].ms
    assert "kernel small" not in found["linear_dgrad", "128x128", 1].ms
    kernels = {side for side in found["grouped linear", "64x128", 6].ms if side.startswith(gpu_measure.FORCED)}
    assert kernels == {"kernel small", "kernel tiled"}
    assert "kernel small" not in found["grouped dgrad", "64x128", 6].ms
    assert "kernel any" not in found["linear", "128x128", 512].ms


def test_rows_and_tables_fit_where_they_are_read(finished):
    assert all(len(gpu_measure.line_of(row)) < 120 for row in finished.rows)
    text = gpu_measure.summary(finished)
    assert all(len(line) < 120 for line in text.splitlines())
    assert len("\n".join(text.splitlines()[-100:])) < 12_000
    for part in (
        "A Test GPU, sm_90a",
        "\nlinear             128x128    1 ",
        "fastest kernel",
        "every row",
        "linear, M=256",
    ):
        assert part in text


def test_a_full_run_has_less_than_a_hundred_lines():
    run = new_run()
    run.copy_gb_s, run.bf16_gflop_s = 4300.0, 788e3
    ms = {OURS: 1.23456, DENSE: 1000.0, BNB_DQ: 1000.0}
    forced = {f"kernel {kernel}": 1000.0 for kernel in gpu_measure.KERNELS}
    ratios = dict.fromkeys((DENSE, BNB_DQ), (100.0, 101.0, 102.0))
    for N, K in gpu_measure.GPU_SHAPES:
        for op, rows in (
            ("quantize", (None,)),
            ("dequantize out=", (None,)),
            ("linear", gpu_measure.ROWS),
            ("linear_dgrad", gpu_measure.ROWS),
            ("lora step", gpu_measure.STEP_ROWS),
        ):
            sides = ms | (forced if op in ("linear", "linear_dgrad") else {})
            run.rows += [
                Row(op, f"{N}x{K}", M, 1, "out", sides, ratios, 1.0, (0.5, 0.6, 0.7), predicted_ms=9.0) for M in rows
            ]
    for op in ("grouped linear", "grouped dgrad"):
        for rows in (8, 128, 4096, 65536):
            run.rows.append(
                Row(op, "1536x2048", rows, 1, "out", ms | forced, ratios, 1.0, (0.5, 0.6, 0.7), predicted_ms=9.0)
            )
    run.said += ["something"] * 30
    lines = gpu_measure.summary(run).splitlines()
    assert len(lines) <= 100
    assert len("\n".join(lines)) < 12_000
    assert lines[-1] == "and 22 more such lines above"


def test_csv_and_pictures_of_a_run_are_written(finished, tmp_path):
    path, *pictures = gpu_measure.write(finished, tmp_path)
    assert path.name == "a-test-gpu.csv"
    rows, about = report.read_csv(path)
    assert [(row.op, row.shape, row.M) for row in rows] == [(row.op, row.shape, row.M) for row in finished.rows]
    assert rows[-1].ms.keys() == finished.rows[-1].ms.keys()
    assert about["machine"] == "A Test GPU"
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture to look at")
    assert [picture.name for picture in pictures] == ["a-test-gpu-speed.png", "a-test-gpu-floor.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_when_time_is_out_what_was_not_measured_is_said(capsys):
    run = new_run(seconds=-1.0)
    run.copy_gb_s = run.bf16_gflop_s = 1.0
    gpu_measure.measure(run, SHAPES, rows=(1, 2))
    assert run.rows == []
    assert "out of time: 5 rows or shapes were not measured" in capsys.readouterr().out
    assert "not measured" in gpu_measure.summary(run)


def test_a_missing_peer_is_said_by_name(monkeypatch):
    monkeypatch.setattr(gpu_measure, "bnb", None)
    run = new_run()
    run.measure_limits()
    gpu_measure.measure(run, SHAPES[:1], rows=(1,), experts=EXPERTS, tokens=TOKENS)
    assert len(run.rows) == 4 + 2 * len(GROUPED_ROWS)
    assert all(BNB_DQ not in row.ms for row in run.rows)
    assert gpu_measure.about(run)["bitsandbytes"] == "missing"
    assert any(cells[1] == f">= 1.00x {BNB_DQ}" and cells[-1] == "not measured"
               for cells in goals.goal_rows(run.rows, goals.gpu_goals(0.65)))  # fmt: skip


def test_a_wrong_kernel_is_said_and_not_timed(monkeypatch, capsys):
    force, linear = Force(), nf4.linear

    def wrong_when_tiled(x, qweight):
        return linear(x, qweight) * (1.05 if force.now == "tiled" else 1)

    monkeypatch.setattr(nf4, "linear", wrong_when_tiled)
    run = new_run(force=force)
    run.measure_limits()
    gpu_measure.measure_linear(run, gpu_measure.Weights((128, 128), run.machine), 4)
    (row,) = run.rows
    assert "kernel tiled" not in row.ms
    assert "kernel dequantize_gemm" in row.ms
    assert run.wrong == 1
    assert "WRONG: kernel tiled" in capsys.readouterr().out


def test_a_kernel_that_refuses_a_shape_is_said_and_no_fault(capsys):
    run = new_run(force=Force(refuses=("small",)))
    run.measure_limits()
    gpu_measure.measure_linear(run, gpu_measure.Weights((128, 128), run.machine), 4)
    assert run.wrong == 0
    assert "kernel small" not in run.rows[0].ms
    assert (
        "linear 128x128, M=4, kernel small: refused: RuntimeError: the forced kernel small cannot"
        in capsys.readouterr().out
    )


def test_wrong_bits_of_quantize_and_dequantize_are_not_timed(monkeypatch):
    run = new_run()
    run.measure_limits()
    weights = gpu_measure.Weights((128, 128), run.machine)
    monkeypatch.setattr(gpu_measure.nf4, "dequantize", lambda qw, out: out.copy_(2 * weights.decoded))
    gpu_measure.measure_dequantize(run, weights)
    assert (run.wrong, [row.op for row in run.rows]) == (1, [])


def test_a_call_that_cannot_be_captured_is_timed_call_by_call(monkeypatch):
    run = new_run()
    run.measure_limits()
    captured = run.machine.sampler

    def sampler(side, copies, graph=True):
        if graph:
            raise RuntimeError("operation not permitted when stream is capturing")
        return captured(side, copies)

    monkeypatch.setattr(run.machine, "sampler", sampler, raising=False)
    gpu_measure.measure_dequantize(run, gpu_measure.Weights((128, 128), run.machine))
    assert run.rows[0].ms[OURS] > 0
    assert any(f"{OURS}: launches are in its time, it cannot be captured: RuntimeError" in said for said in run.said)


def test_break_even_names_the_fastest_kernel_over_ranges_of_rows():
    def row(M: int, **ms: float) -> Row:
        return Row("linear", "4096x4096", M, 1, "out", {OURS: 1.0, **{f"kernel {k}": v for k, v in ms.items()}})

    rows = [
        row(1024, tiled=3, dequantize_gemm=2),
        row(1, small=1, tiled=2),
        row(16, small=1, tiled=2),
        row(256, tiled=1, dequantize_gemm=2),
    ]
    assert [line.split() for line in gpu_measure.break_even(rows)] == [
        ["linear", "4096x4096:", "small", "to", "16,", "tiled", "to", "256,", "dequantize_gemm", "to", "1024"]
    ]


def test_goals_of_a_gpu_are_read_from_their_rows():
    def row(op: str, shape: str, M: int | None, share: float, **ratios: float) -> Row:
        names = {"dense": DENSE, "bnb": BNB_DQ, "without": goals.WITHOUT_LORA}
        return Row(op, shape, M, 1, "out", {OURS: 1.0}, {names[k]: (v - 0.1, v, v + 0.1) for k, v in ratios.items()},
                   1.0, (share, share, share))  # fmt: skip

    rows = [
        row("linear", goals.LARGE, 1, 0.7, dense=2.0, bnb=1.5),
        row("linear", goals.LARGE, 4, 0.6, dense=2.0, bnb=0.9),
        row("linear", goals.SHAPE, 64, 0.6, dense=1.0, bnb=1.2),
        row("linear_dgrad", goals.SHAPE, 8192, 0.6, dense=0.94, bnb=1.2),
        row("lora step", goals.SHAPE, 2048, 0.6, without=0.98),
    ]
    verdicts = {(work, goal): (measured, verdict) for work, goal, measured, _, verdict
                in goals.goal_rows(rows, goals.gpu_goals(0.65))}  # fmt: skip
    assert verdicts["linear, M=1, 28672x8192", ">= 65% of the floor"] == ("70%", "met")
    assert verdicts["linear, M=4, 28672x8192", ">= 65% of the floor"] == ("60%", "not met")
    assert verdicts["linear, M=64", ">= 1.00x dense bf16"] == ("1.00x", "met")
    assert verdicts["linear_dgrad, M=8192", ">= 0.95x dense bf16"] == ("0.94x", "not met")
    assert verdicts["lora step, M=2048", ">= 0.97x without LoRA"] == ("0.98x", "met")
    assert verdicts["every row", f">= 1.00x {BNB_DQ}"] == ("0.90x", "not met")
    assert verdicts["linear, M=256", ">= 1.00x dense bf16"] == ("", "not measured")


def test_turns_are_taken_from_samplers():
    order = []
    samplers = {name: lambda name=name: order.append(name) or float(len(order)) for name in ("a", "b")}
    samples = harness.take_turns(samplers, seconds=-1.0)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [1, 4, 5, 8, 9], "b": [2, 3, 6, 7, 10]}


def python(name: str, code: str, seconds: float = 60.0, **settings) -> gpu.Stage:
    return gpu.Stage(name, [sys.executable, "-c", code], seconds, **settings)


def test_stages_go_on_after_one_that_fails_is_refused_or_cannot_run(capsys):
    ended = gpu.run_stages(
        [
            python("works", "print('hello')"),
            python("fails", "raise SystemExit(3)"),
            python("lacks", "pass", needs="no-such-program"),
            python("refused", "raise SystemExit('Error: Device not supported')", begins_with="begins"),
            python("wrong", "print('begins'); raise SystemExit(1)", begins_with="begins"),
            python("told", "import os, sys; print(os.environ['NF4_TEST'], sys.argv)", environment={"NF4_TEST": "yes"}),
        ],
        seconds=60,
    )
    assert ended["works"].startswith("ok in")
    assert ended["fails"].startswith("FAILED with status 3")
    assert ended["lacks"] == "skipped: no-such-program is not on this machine"
    assert ended["refused"].startswith("skipped: ")
    assert ended["refused"].endswith("refuses this device: Error: Device not supported")
    assert ended["wrong"].startswith("FAILED with status 1")
    assert ended["told"].startswith("ok")
    printed = capsys.readouterr().out
    assert "hello\n" in printed
    assert "yes ['-c']" in printed


def test_a_stage_that_takes_too_long_is_ended_with_what_it_started(tmp_path, capsys):
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    ended = gpu.run_stages([python("endless", code, seconds=2.0), python("after", "print('after it')")], seconds=60)
    assert ended["endless"] == "OUT OF TIME after 2 s"
    assert ended["after"].startswith("ok")
    assert "begun\n" in capsys.readouterr().out
    before = alive.stat().st_mtime_ns
    time.sleep(0.3)
    assert alive.stat().st_mtime_ns == before, "what the stage started is still running"


def test_stages_share_the_time():
    now = [0.0]
    ended = gpu.run_stages([python("a", "pass"), python("b", "pass")], gpu.GRACE_SECONDS - 1, clock=lambda: now[0])
    assert ended == {"a": "skipped: no time left", "b": "skipped: no time left"}


def test_the_stages_of_make_gpu():
    stages = {stage.name: stage for stage in gpu.stages("9.0a")}
    assert list(stages) == ["build", "tests", "triton", "memcheck", "racecheck", "benchmark"]
    assert stages["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert sum(stage.seconds for stage in stages.values() if stage.name != "benchmark") <= 380
    assert stages["memcheck"].begins_with == gpu.SANITIZED_BEGINS
    assert (gpu.architecture_of((9, 0)), gpu.architecture_of((8, 6)), gpu.architecture_of((12, 0))) == (
        "9.0a", "8.6", "12.0",
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        gpu.find_architecture()


def test_the_sanitizers_script_calls_every_op_with_every_kernel(capsys, monkeypatch):
    monkeypatch.setattr(gpu_sanitize, "SHAPES", ((33, 71),))
    monkeypatch.setattr(gpu_sanitize, "ROWS", (9,))
    force = Force(refuses=("small",))
    assert gpu_sanitize.main("cpu", force) == 0
    assert force.seen == {"tiled", "dequantize_gemm", "any"}
    ops = {op for _, op, _ in gpu_sanitize.cases()}
    assert ops == {"quantize", "quantize_absmax", "dequantize", "linear", "linear_dgrad", "lora_grad"}
    printed = capsys.readouterr().out
    assert printed.startswith(gpu.SANITIZED_BEGINS)
    assert re.search(r"\d+ calls, 0 wrong, 12 refused by a forced kernel", printed)  # 3 dtypes, 2 ops, with LoRA or not


def test_the_sanitizers_script_runs_every_kernel(monkeypatch, executor_ops):
    """The kernels themselves, on the host executor."""
    monkeypatch.setattr(gpu_sanitize, "SHAPES", ((32, 64), (33, 71)))
    monkeypatch.setattr(gpu_sanitize, "ROWS", (9,))
    assert gpu_sanitize.main("cpu", gpu_measure.Forcing(executor_ops.executor.library), executor_ops.ops) == 0
    ran = {launch.kernel.partition("<")[0] for launch in executor_ops.launches()}
    assert ran == {kernel.kernel.partition("<")[0] for kernel in cuda_report.read_csv()}


def test_an_unknown_kernel_cannot_be_forced(executor_ops):
    force = gpu_measure.Forcing(executor_ops.executor.library)
    with pytest.raises(ValueError, match="huge: must be any, small, tiled or dequantize_gemm"), force("huge"):
        pass


def test_the_sanitizers_script_finds_a_wrong_result(monkeypatch):
    monkeypatch.setattr(gpu_sanitize, "SHAPES", ((33, 71),))
    monkeypatch.setattr(gpu_sanitize, "ROWS", (9,))
    right = gpu_sanitize.reference.lora_grad
    monkeypatch.setattr(gpu_sanitize.reference, "lora_grad", lambda *args: 1.1 * right(*args))
    assert gpu_sanitize.main("cpu", Force()) == 3


KERNEL = gpu_predictions.Kernel(
    "linear_small_kernel<BFloat16, 2>", "sm_90a", "13.0", 96, 0, 0, 0, 900, 512, 128, 64, "LOP3 128 LDS 64 HMMA 32"
)
CARD = gpu_predictions.Card("a card", "sm_90a", 100, 1.0, 1000.0, 400e3)  # 100 * 1e9 cycles of SMs a second


def test_a_product_takes_the_longest_of_its_units():
    units = gpu_predictions.decoding(CARD, KERNEL, 1e6)
    assert units["instructions"] == pytest.approx(1e6 * 512 / 128 / 128 / 1e8)
    assert units["integer pipe"] == pytest.approx(1e6 * 128 / 128 / 64 / 1e8)
    assert units["shared memory"] == pytest.approx(1e6 * 64 / 128 / 32 / 1e8)
    one = gpu_predictions.product(CARD, KERNEL, 4096, 4096, 16)  # 16 rows a decoded fragment
    assert one.bound == "bytes"
    assert one.ms == pytest.approx((0.516 * 2**24 + 2 * 16 * 8192) / 1e9 + gpu_predictions.LAUNCH_MS)
    many = gpu_predictions.product(CARD, KERNEL, 4096, 4096, 17)
    assert many.bound == "instructions"
    assert many.ms == pytest.approx(2 * 2**24 * 4 / 128 / 1e8 + gpu_predictions.LAUNCH_MS)


def test_predictions_are_of_the_committed_report(monkeypatch):
    monkeypatch.setattr(gpu_predictions, "_report", lambda: (KERNEL,))
    found = gpu_predictions.predictions(CARD, "linear", 4096, 4096, 16)
    assert set(found) == {"small", "dequantize_gemm"}
    assert set(gpu_predictions.predictions(CARD, "linear", 4096, 4096, 17)) == {"dequantize_gemm"}
    assert gpu_predictions.predicted_ms(CARD, "linear", 4096, 4096, 16) == found["small"].ms
    assert gpu_predictions.predicted_ms(CARD, "lora step", 4096, 4096, 16) is None
    assert found["dequantize_gemm"].ms == pytest.approx(
        (2.516 * 2**24 / 1e9) + 2**29 / 400e9 + 2 * gpu_predictions.LAUNCH_MS, 1e-3
    )


def test_a_device_is_predicted_by_the_architecture_that_it_runs():
    def arch(name: str) -> str:
        return gpu_predictions.card_of("a card", name, 1, 1.0, 1.0, 1.0).arch

    assert [arch(a) for a in ("sm_80", "sm_87", "sm_90a", "sm_103", "sm_121")] == [
        "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120",
    ]  # fmt: skip


def test_a_known_card_is_predicted_at_the_clock_that_it_keeps():
    assert gpu_predictions.card_of("NVIDIA H200", "sm_90a", 132, 1.98, 1.0, 1.0).ghz == 1.755
    assert gpu_predictions.card_of("Another", "sm_90a", 132, 1.98, 1.0, 1.0).ghz == 1.98


def test_the_tests_of_a_gpu_are_those_that_ask_for_one():
    def item(fixtures: tuple[str, ...], **params: str) -> SimpleNamespace:
        callspec = {"callspec": SimpleNamespace(params=params)} if params else {}
        return SimpleNamespace(fixturenames=fixtures, **callspec)

    items = [
        item(("gpu",)),
        item(("cuda_ops",), cuda_ops="cuda"),
        item(("cuda_ops",), cuda_ops="executor_ops"),
        item(("executor_ops",)),
        item(("triton_gpu",)),
        item(("triton_ops",), triton_ops="cuda"),
        item(("triton_ops",), triton_ops="interpreter"),
    ]
    assert [gpu_tests.runs_on_a_gpu(i) for i in items] == [True, True, False, False, True, True, False]
