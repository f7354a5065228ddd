"""What a run on a GPU says in the end: the rows, the fastest kernels, the goals; its CSV and pictures."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import harness
from ..harness import OURS, Row
from ..report import plots
from ..report import tables as report
from ..report.goals import gpu_goals
from . import sides
from .sides import forced_ms
from .timing import LINE, Run, line_of

SHOWN_ROWS = {  # by the summary; the CSV has all
    "linear": (1, 4, 16, 64, 256, 2048),
    "linear_dgrad": (16, 64, 2048),
    "lora r=16": (1, 2048),
    "lora step": (2048,),
    "grouped linear": (8, 128, 65536),
    "grouped dgrad": (65536,),
}
SAID_LINES = 8  # of what was wrong or missing, at the end of the summary


def break_even(rows: Iterable[Row]) -> Iterator[str]:
    """For each op and shape the fastest kernel at each M: "small to 16, tiled to 512, dequantize_gemm"."""
    best: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row in rows:
        forced = forced_ms(row)
        if forced:
            best.setdefault((row.op, row.shape), []).append((row.M, min(forced, key=forced.get)))
    for (op, shape), winners in best.items():
        winners.sort()
        ranges = [
            f"{kernel} to {M}" for (M, kernel), after in zip(winners, [*winners[1:], (0, "")]) if after[1] != kernel
        ]
        yield f"{op:12} {shape:>10}: {', '.join(ranges)}"


def summary(run: Run) -> str:
    """What the run says, in less than a hundred lines of less than 120 characters."""
    m = run.machine
    shown = [row for row in run.rows if row.M is None or row.M in SHOWN_ROWS.get(row.op, ())]
    lines = [
        f"{m.name}, {m.arch}, {m.sms} SMs: copy {run.copy_gb_s:.0f} GB/s, dense bf16 {run.bf16_gflop_s / 1e3:.1f} "
        "TFLOP/s, both measured",
        "pred: predicted ms; ratios: how many times faster ours is; last the fastest kernel and our time over its",
        "",
        *map(line_of, sorted(shown, key=lambda r: (r.op, r.shape, r.M or 0))),
        "",
        "fastest kernel at the measured M",
        *break_even(run.rows),
        "",
        report.goal_table(run.rows, gpu_goals(0.65 if m.is_hbm else 0.75)),
    ]
    most = max((row for row in run.rows if row.peak_mib), key=lambda row: row.peak_mib[OURS], default=None)
    if most:
        lines.append(f"largest temporary: {most.op} {most.shape} M={most.M}, {most.peak_mib[OURS]:.0f} MiB")
    lines += run.said[:SAID_LINES]
    if len(run.said) > SAID_LINES:
        lines.append(f"and {len(run.said) - SAID_LINES} more such lines above")
    return "\n".join(line[:LINE] for line in "\n".join(lines).splitlines())


def about(run: Run) -> dict[str, str]:
    limits = {"copy_gb_s": f"{run.copy_gb_s:.0f}", "bf16_gflop_s": f"{run.bf16_gflop_s:.0f}"}
    limits["is_hbm"] = str(run.machine.is_hbm)
    return harness.about(run.machine.name, "cuda", sides.bnb.__version__ if sides.bnb else "missing") | limits


def write_rows(run: Run, folder: Path = report.RESULTS) -> Path:
    """The CSV of the rows by now."""
    path = report.csv_path(about(run), folder)
    folder.mkdir(parents=True, exist_ok=True)
    report.write_csv(path, run.rows, about(run))
    return path


def write(run: Run, folder: Path = report.RESULTS) -> list[Path]:
    """The CSV and the pictures; pictures only where matplotlib is there."""
    path = write_rows(run, folder)
    shapes = list(dict.fromkeys(row.shape for row in run.rows))[:2]
    try:
        pictures = plots.draw_rows([row for row in run.rows if row.shape in shapes], run.machine.name, path)
    except ImportError as error:
        run.say(f"no picture: {error}")
        pictures = []
    return [path, *pictures]
