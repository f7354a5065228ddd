"""The benchmark of a GPU, on the CPU with the CPU's clock at tiny shapes."""

import pytest
from support import triton_interpreter
from support.gpu_run import Force, new_run

import nf4kernels as nf4
from benchmarks.gpu import cases, measure, sides, summary, timing
from benchmarks.gpu.weights import Weights
from benchmarks.harness import BNB_DQ, DENSE, OURS, Row
from benchmarks.report import goals
from benchmarks.report import tables as report
from benchmarks.shapes import ExpertsShape

SHAPES, EXPERTS = ((128, 128), (64, 256)), ExpertsShape(6, 6, 64, 128)
TOKENS = (1, 16)
GROUPED_ROWS = (6, 96)  # each token goes through all six experts


@pytest.fixture(scope="module")
def finished():
    """One whole run at tiny shapes, Triton's kernels under its interpreter."""
    triton_interpreter.correct()
    run = new_run()
    run.measure_limits()
    measure.measure(run, SHAPES, rows=(1, 64, 512), experts=EXPERTS, tokens=TOKENS)
    return run


@pytest.fixture
def found(finished) -> dict[tuple, Row]:
    return {(row.op, row.shape, row.M): row for row in finished.rows}


def test_every_op_is_measured_beside_its_peers(finished, found):
    assert finished.wrong == 0, finished.said
    assert finished.skipped == 0
    shapes = [f"{N}x{K}" for N, K in SHAPES]
    expected = {("quantize", s, None) for s in shapes} | {("dequantize out=", s, None) for s in shapes}
    expected |= {(op, s, M) for op in ("linear", "linear_dgrad") for s in shapes for M in (1, 64, 512)}
    expected |= {("lora step", s, 512) for s in shapes}
    expected |= {(f"lora r={rank}", s, 1) for rank in measure.RANKS for s in shapes}
    expected |= {(f"grouped {op}", "64x128", rows) for op in ("linear", "dgrad") for rows in GROUPED_ROWS}
    assert set(found) == expected
    for row in found.values():
        assert all(ms > 0 for ms in row.ms.values())
        assert row.share[1] > 0
        if sides.bnb is not None and row.op != "dequantize out=":  # bitsandbytes has no `out` on the CPU
            assert BNB_DQ in row.ratios
        if row.op.startswith(("l", "g")):
            assert DENSE in row.ratios
    assert all(sides.TRITON in row.ratios for row in found.values() if row.op in ("quantize", "linear", "linear_dgrad"))
    assert goals.WITHOUT_LORA in found["lora step", "128x128", 512].ratios
    assert goals.WITHOUT_LORA in found["lora r=64", "128x128", 1].ratios


def test_every_kernel_is_forced_where_it_is_worth_its_time(finished, found):
    assert finished.force.seen == set(sides.KERNELS)
    kernels = {side for side in found["linear", "128x128", 1].ms if side.startswith(sides.FORCED)}
    assert kernels == {f"kernel {kernel}" for kernel in sides.KERNELS}
    assert "kernel small" not in found["linear", "128x128", 64].ms
    assert "kernel small" not in found["linear_dgrad", "128x128", 1].ms
    kernels = {side for side in found["grouped linear", "64x128", 6].ms if side.startswith(sides.FORCED)}
    assert kernels == {"kernel small", "kernel tiled"}
    assert "kernel small" not in found["grouped dgrad", "64x128", 6].ms
    assert "kernel any" not in found["linear", "128x128", 512].ms


def test_rows_and_tables_fit_where_they_are_read(finished):
    assert all(len(timing.line_of(row)) < 120 for row in finished.rows)
    text = summary.summary(finished)
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


def test_csv_and_pictures_of_a_run_are_written(finished, tmp_path):
    path, *pictures = summary.write(finished, tmp_path)
    assert path.name == "a-test-gpu.csv"
    rows, about = report.read_csv(path)
    assert [(row.op, row.shape, row.M) for row in rows] == [(row.op, row.shape, row.M) for row in finished.rows]
    assert rows[-1].ms.keys() == finished.rows[-1].ms.keys()
    assert about["machine"] == "A Test GPU"
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture to look at")
    assert [picture.name for picture in pictures] == ["a-test-gpu-speed.png", "a-test-gpu-floor.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_the_rows_are_written_as_they_come(tmp_path):
    written = []

    def keep(run):
        summary.write_rows(run, tmp_path)
        written.append(len(report.read_csv(tmp_path / "a-test-gpu.csv")[0]))

    run = new_run(keep=keep)
    run.measure_limits()
    weights = Weights((128, 128), run.machine)
    cases.measure_dequantize(run, weights)
    cases.measure_linear(run, weights, 4)
    assert written == [1, 2]
    assert run.machine.forgotten == 2, "the graphs of each row are gone when the next one begins"


def test_when_time_is_out_what_was_not_measured_is_said(capsys):
    run = new_run(seconds=-1.0)
    run.copy_gb_s = run.bf16_gflop_s = 1.0
    measure.measure(run, SHAPES, rows=(1, 2))
    assert run.rows == []
    assert "out of time: 5 rows or shapes were not measured" in capsys.readouterr().out
    assert "not measured" in summary.summary(run)


def test_a_missing_peer_is_said_by_name(monkeypatch):
    monkeypatch.setattr(sides, "bnb", None)
    run = new_run()
    run.measure_limits()
    measure.measure(run, SHAPES[:1], rows=(1,), experts=EXPERTS, tokens=TOKENS)
    assert len(run.rows) == 4 + len(measure.RANKS) + 2 * len(GROUPED_ROWS)
    assert all(BNB_DQ not in row.ms for row in run.rows)
    assert summary.about(run)["bitsandbytes"] == "missing"
    assert any(cells[1] == f">= 1.00x {BNB_DQ}" and cells[-1] == "not measured"
               for cells in goals.goal_rows(run.rows, goals.gpu_goals(0.65)))  # fmt: skip


def test_a_wrong_kernel_is_said_and_not_timed(monkeypatch, capsys):
    force, linear = Force(), nf4.linear

    def wrong_when_tiled(x, qweight):
        return linear(x, qweight) * (1.05 if force.now == "tiled" else 1)

    monkeypatch.setattr(nf4, "linear", wrong_when_tiled)
    run = new_run(force=force)
    run.measure_limits()
    cases.measure_linear(run, Weights((128, 128), run.machine), 4)
    (row,) = run.rows
    assert "kernel tiled" not in row.ms
    assert "kernel any" in row.ms
    assert run.wrong == 1
    assert "WRONG: kernel tiled" in capsys.readouterr().out


def test_a_kernel_that_refuses_a_shape_is_said_and_no_fault(capsys):
    run = new_run(force=Force(refuses=("small",)))
    run.measure_limits()
    cases.measure_linear(run, Weights((128, 128), run.machine), 4)
    assert run.wrong == 0
    assert "kernel small" not in run.rows[0].ms
    assert (
        "linear 128x128, M=4, kernel small: refused: RuntimeError: the forced kernel small cannot"
        in capsys.readouterr().out
    )


def test_wrong_bits_of_quantize_and_dequantize_are_not_timed(monkeypatch):
    run = new_run()
    run.measure_limits()
    weights = Weights((128, 128), run.machine)
    monkeypatch.setattr(nf4, "dequantize", lambda qw, out: out.copy_(2 * weights.decoded))
    cases.measure_dequantize(run, weights)
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
    cases.measure_dequantize(run, Weights((128, 128), run.machine))
    assert run.rows[0].ms[OURS] > 0
    assert any(f"{OURS}: launches are in its time, it cannot be captured: RuntimeError" in said for said in run.said)
