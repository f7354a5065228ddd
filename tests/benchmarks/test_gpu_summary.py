"""What a benchmark of a GPU says of its rows, which are made up here."""

from support.gpu_run import new_run

from benchmarks.gpu import measure, sides, summary
from benchmarks.harness import BNB_DQ, DENSE, OURS, Row
from benchmarks.report import goals
from benchmarks.shapes import GPU_SHAPES


def test_a_full_run_has_less_than_a_hundred_lines():
    run = new_run()
    run.copy_gb_s, run.bf16_gflop_s = 4300.0, 788e3
    ms = {OURS: 1.23456, DENSE: 1000.0, BNB_DQ: 1000.0}
    forced = {f"kernel {kernel}": 1000.0 for kernel in sides.KERNELS}
    ratios = dict.fromkeys((DENSE, BNB_DQ), (100.0, 101.0, 102.0))
    for N, K in GPU_SHAPES:
        for op, rows in (
            ("quantize", (None,)),
            ("dequantize out=", (None,)),
            ("linear", measure.ROWS),
            ("linear_dgrad", measure.ROWS),
            ("lora step", measure.STEP_ROWS),
        ):
            times = ms | (forced if op in ("linear", "linear_dgrad") else {})
            run.rows += [
                Row(op, f"{N}x{K}", M, 1, "out", times, ratios, 1.0, (0.5, 0.6, 0.7), predicted_ms=9.0) for M in rows
            ]
    for op in ("grouped linear", "grouped dgrad"):
        for rows in (8, 128, 4096, 65536):
            run.rows.append(
                Row(op, "1536x2048", rows, 1, "out", ms | forced, ratios, 1.0, (0.5, 0.6, 0.7), predicted_ms=9.0)
            )
    run.said += ["something"] * 30
    lines = summary.summary(run).splitlines()
    assert len(lines) <= 100
    assert len("\n".join(lines)) < 12_000
    assert lines[-1] == "and 22 more such lines above"


def test_break_even_names_the_fastest_kernel_over_ranges_of_rows():
    def row(M: int, **ms: float) -> Row:
        return Row("linear", "4096x4096", M, 1, "out", {OURS: 1.0, **{f"kernel {k}": v for k, v in ms.items()}})

    rows = [
        row(1024, tiled=3, dequantize_gemm=2),
        row(1, small=1, tiled=2),
        row(16, small=1, tiled=2),
        row(256, tiled=1, dequantize_gemm=2),
    ]
    assert [line.split() for line in summary.break_even(rows)] == [
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
