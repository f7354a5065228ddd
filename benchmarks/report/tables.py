"""Rows to and from CSV, and the tables of a run in the terminal and in the README."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from nf4kernels.model.quantize import table

from ..harness import BNB, BNB_DQ, DENSE, OURS, ROOT, Row
from .goals import GOALS, MODEL_STEP, SHAPE, Goal, goal_rows

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
OP_ORDER = (
    "quantize",
    "dequantize out=",
    "dequantize fresh",
    "linear",
    "linear + dgrad",
    "lora step",
    MODEL_STEP,
    "decode",
)
FIGURES = (
    "op", "shape", "M", "threads", "cache", "side", "ms", "ours_is_faster_by", "p20", "p80",
    "floor_ms", "share_of_floor", "share_p20", "share_p80", "tokens", "tokens_per_s", "peak_mib", "other_cores",
    "predicted_ms",
)  # fmt: skip


def csv_path(about: dict[str, str], folder: Path = RESULTS) -> Path:
    """results/<machine>.csv"""
    return folder / (re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()) + ".csv")


def write_csv(path: Path, rows: Iterable[Row], about: dict[str, str]) -> None:
    """One line a row and side; ours carries the floor, every line carries `about`."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIGURES, *about])
        writer.writeheader()
        for row in rows:
            for side, ms in row.ms.items():
                line = {"op": row.op, "shape": row.shape, "M": row.M, "threads": row.threads, "cache": row.cache}
                line |= {"side": side, "ms": f"{ms:.5g}"}
                if side in row.ratios:
                    line |= zip(("p20", "ours_is_faster_by", "p80"), (f"{r:.4g}" for r in row.ratios[side]))
                if side == OURS and row.share:
                    line |= zip(("share_p20", "share_of_floor", "share_p80"), (f"{s:.4g}" for s in row.share))
                    line["floor_ms"] = f"{row.floor_ms:.5g}"
                if row.tokens:
                    line |= {"tokens": row.tokens, "tokens_per_s": f"{row.tokens / ms * 1e3:.5g}"}
                if side in row.peak_mib:
                    line["peak_mib"] = f"{row.peak_mib[side]:.0f}"
                if side == OURS and row.predicted_ms is not None:
                    line["predicted_ms"] = f"{row.predicted_ms:.5g}"
                if row.others is not None:
                    line["other_cores"] = f"{row.others:.2f}"
                writer.writerow(line | about)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """(rows, about) as `write_csv` got them, to the digits it wrote."""
    rows: dict[tuple, Row] = {}
    about: dict[str, str] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            key = tuple(line[name] for name in FIGURES[:5])
            about = {name: value for name, value in line.items() if name not in FIGURES}
            op, shape, M, threads, cache = key
            row = rows.setdefault(key, Row(op, shape, int(M) if M else None, int(threads), cache, {}))
            side = line["side"]
            row.ms[side] = float(line["ms"])
            if line["ours_is_faster_by"]:
                row.ratios[side] = _spread(line, "p20", "ours_is_faster_by", "p80")
            if line["floor_ms"]:
                row.floor_ms = float(line["floor_ms"])
                row.share = _spread(line, "share_p20", "share_of_floor", "share_p80")
            if line["tokens"]:
                row.tokens = int(line["tokens"])
            if line["other_cores"]:
                row.others = float(line["other_cores"])
            if line.get("predicted_ms"):
                row.predicted_ms = float(line["predicted_ms"])
            if line["peak_mib"]:
                row.peak_mib[side] = float(line["peak_mib"])
    return list(rows.values()), about


def _spread(line: dict[str, str], *names: str) -> tuple[float, float, float]:
    return tuple(float(line[name]) for name in names)


def markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


GOAL_HEADER = ("work", "goal", "measured", "p20-p80", "verdict")


def goal_table(rows: list[Row], goals: tuple[Goal, ...] = GOALS) -> str:
    return table([GOAL_HEADER, *goal_rows(rows, goals)], left=(0, 1, 4))


def op_table(rows: list[Row]) -> str:
    """The rows of SHAPE with all threads: the time, the share of the floor, and how much faster ours is than each."""
    most = max(row.threads for row in rows)
    chosen = [row for row in rows if row.shape == SHAPE and row.threads == most]
    chosen.sort(key=lambda row: (OP_ORDER.index(row.op), row.M or 0, row.cache != "out"))
    header = ("op", "M", "weight in a cache", "ms", "share of the floor", BNB, BNB_DQ, f"{DENSE} or copy_")
    return markdown(header, map(_op_cells, chosen))


def _op_cells(row: Row) -> tuple[str, ...]:
    def ratio(side: str) -> str:
        if side not in row.ratios:
            return ""
        p20, median, p80 = row.ratios[side]
        return f"**{median:.2f}x** ({p20:.2f}-{p80:.2f})"

    dense = next((side for side in row.ratios if side not in (BNB, BNB_DQ)), "")
    return (
        row.op, str(row.M or ""), {"in": "yes", "out": "no"}.get(row.cache, ""), f"{row.ms[OURS]:.3g}",
        f"{row.share[1]:.0%}" if row.share else "", ratio(BNB), ratio(BNB_DQ), ratio(dense),
    )  # fmt: skip


def model_table(rows: list[Row]) -> str:
    header = ("model", "work", "side", "tokens/s", "ours is faster by", "peak memory of the process, MiB")
    cells = []
    for row in rows:
        if row.tokens is None:
            continue
        for side, ms in row.ms.items():
            p20, median, p80 = row.ratios.get(side, (0, 0, 0))
            faster = f"**{median:.2f}x** ({p20:.2f}-{p80:.2f})" if median else ""
            peak = f"{row.peak_mib[side]:.0f}" if side in row.peak_mib else ""
            cells.append((row.shape, row.op, side, f"{row.tokens / ms * 1e3:.1f}", faster, peak))
    return markdown(header, cells)


def readme_section(path: Path) -> str:
    """What the README says between its markers about results/<path>."""
    rows, about = read_csv(path)
    most = max(row.threads for row in rows)
    parts = [
        f"On {about['machine']}, {most} threads, {about['kernels']} kernels, torch {about['torch']}, bitsandbytes "
        f"{about['bitsandbytes']}, commit {about['commit']}, {about['date']}, by `{about['command']}`:",
        markdown(GOAL_HEADER, goal_rows(rows)),
        f"Every {SHAPE} row of that run with {most} threads; all others are in the CSV:",
        op_table(rows),
    ]
    if any(row.tokens for row in rows):
        parts += ["A whole model:", model_table(rows)]
    for kind, what in (("speed", "Speed-up over dense bf16 against M"), ("floor", "Share of the floor")):
        picture = path.with_name(f"{path.stem}-{kind}.png")
        if picture.exists():
            parts.append(f"![{what}](benchmarks/results/{picture.name})")
    return "\n\n".join(parts)


MARKED = re.compile(r"(<!-- speed: (\S+) -->\n).*?(\n<!-- end of speed -->)", flags=re.DOTALL)


def named_in(readme: str) -> Path:
    """The CSV that the README's speed section is made of."""
    return RESULTS / MARKED.search(readme)[2]


def with_section(readme: str, path: Path) -> str:
    """The README with its speed section made of that CSV."""
    section = readme_section(path)
    return MARKED.sub(lambda found: f"<!-- speed: {path.name} -->\n{section}{found[3]}", readme)
