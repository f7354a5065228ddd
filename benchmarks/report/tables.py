"""Rows to and from CSV, and the tables of a run in the terminal, in the README and in docs/speed.md."""

import csv
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from nf4kernels.model.report import table

from ..harness import BNB, BNB_DQ, GGML, INT4, OURS, ROOT, Row, is_disturbed, of_bitsandbytes
from .goals import GOALS, MODEL_STEP, SHAPE, Goal, broken, goal_rows, rule

IQ4_NL = next(iter(GGML))
RESULTS = ROOT / "benchmarks" / "results"
README, SPEED, SPEED_AMX = ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "speed-amx.md"
WIDTH = 120  # of a line of Markdown
MARK = "†"  # of a row that other processes disturbed
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
    "op", "shape", "M", "threads", "cache", "dtype", "isa", "side", "ms", "ours_is_faster_by", "p20", "p80",
    "floor_ms", "share_of_floor", "share_p20", "share_p80", "tokens", "tokens_per_s", "peak_mib", "loss", "other_cores",
    "predicted_ms",
)  # fmt: skip
# What a row is told apart by, and what an older file without it means.
KEY = dict.fromkeys(FIGURES[:5], "") | {"dtype": "bf16", "isa": ""}


def csv_path(about: dict[str, str], folder: Path = RESULTS) -> Path:
    """results/<machine>.csv"""
    return folder / (re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()) + ".csv")


def write_csv(path: Path, rows: Iterable[Row], about: dict[str, str]) -> None:
    """One line a row and side; ours carries the floor, every line carries `about`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*FIGURES, *about])
        writer.writeheader()
        for row in rows:
            for side, ms in row.ms.items():
                line = {"op": row.op, "shape": row.shape, "M": row.M, "threads": row.threads, "cache": row.cache}
                line |= {"dtype": row.dtype, "isa": row.isa}
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
                if side in row.loss:
                    line["loss"] = f"{row.loss[side]:.4f}"
                if side == OURS and row.predicted_ms is not None:
                    line["predicted_ms"] = f"{row.predicted_ms:.5g}"
                if row.others is not None:
                    line["other_cores"] = f"{row.others:.2f}"
                writer.writerow(line | about)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """(rows, about) as `write_csv` got them, to the digits it wrote."""
    rows: dict[tuple, Row] = {}
    about: dict[str, str] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            key = tuple(line.get(name) or default for name, default in KEY.items())
            about = {name: value for name, value in line.items() if name not in FIGURES}
            op, shape, M, threads, cache, dtype, isa = key
            new = Row(op, shape, int(M) if M else None, int(threads), cache, {}, dtype=dtype, isa=isa)
            row = rows.setdefault(key, new)
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
            if line.get("loss"):
                row.loss[side] = float(line["loss"])
    return list(rows.values()), about


def _spread(line: dict[str, str], *names: str) -> tuple[float, float, float]:
    return tuple(float(line[name]) for name in names)


def markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


GOAL_HEADER = ("work", "goal", "measured", "p20-p80", "verdict")


def goal_table(rows: list[Row], goals: tuple[Goal, ...] = GOALS) -> str:
    return table([GOAL_HEADER, *goal_rows(rows, goals)], left=(0, 1, 4))


def op_table(rows: list[Row], cache: str) -> str:
    """The rows of SHAPE with all threads: the time, the share of the floor, and how much faster ours is than each."""
    chosen = [row for row in rows if row.shape == SHAPE and row.threads == _threads(rows) and row.cache == cache]
    chosen = [row for row in chosen if row.is_usual]
    chosen.sort(key=lambda row: (_place(row.op), row.M or 0))
    header = ("op", "M", "ms", "floor", BNB, INT4, IQ4_NL, "dense or a copy")
    return markdown(header, ((row.op, str(row.M or ""), *_figures(row, (INT4, IQ4_NL))) for row in chosen))


def _place(op: str) -> int:
    return OP_ORDER.index(op) if op in OP_ORDER else len(OP_ORDER)


def forced_table(rows: list[Row], isa: str) -> str:
    """The same of the rows in which that instruction set was forced on every side, all dtypes and shapes."""
    chosen = sorted((row for row in rows if row.isa == isa), key=lambda row: (_place(row.op), row.shape))
    header = ("op", "weight", "M", "x", "ms", "floor", BNB, INT4, "dense")
    return markdown(
        header, ((row.op, row.shape, str(row.M or ""), row.dtype, *_figures(row, (INT4,))) for row in chosen)
    )


def _figures(row: Row, beside: tuple[str, ...]) -> tuple[str, ...]:
    """Time, share of the floor, and the ratios: bitsandbytes' faster layer, those beside it, dense or what is last."""
    theirs = of_bitsandbytes(row) or ""
    dense = next((side for side in row.ratios if side not in (BNB, BNB_DQ, INT4, *GGML)), "")
    share = f"{row.share[1]:.0%}" if row.share else ""
    return f"{row.ms[OURS]:.3g}{_mark(row)}", share, *(_ratio(row, side) for side in (theirs, *beside, dense))


def rule_lists(rows: list[Row]) -> list[str]:
    """Every row in which a peer was faster, by name: first those where it was so in four of five rounds."""
    lines: dict[bool, list[str]] = {True: [], False: []}
    for row, faster in broken(rows):
        beyond = any(p80 < 1 for _, _, p80 in faster.values())
        peers = "; ".join(f"{_ratio(row, side)} of {side}" for side in faster)
        lines[beyond].append(_wrapped_item(f"{_name(row)}: {peers}"))
    titles = {True: "Slower in four of five rounds:", False: "Slower by the median, within the spread of the rounds:"}
    return [part for beyond, items in lines.items() if items for part in (titles[beyond], "\n".join(items))]


def _mark(row: Row) -> str:
    return MARK if is_disturbed(row.others) else ""


def _name(row: Row) -> str:
    threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
    parts = [f"{row.op} {row.shape}", f"M={row.M}" if row.M else "", threads, row.isa]
    parts += [{"in": "cached", "out": "not cached"}.get(row.cache, ""), row.dtype if row.dtype != "bf16" else ""]
    return ", ".join(part for part in parts if part) + _mark(row)


def _ratio(row: Row, side: str) -> str:
    """As "1.33 (1.29-1.48)": the median of the rounds' ratios and their 20th and 80th percentile."""
    if side not in row.ratios:
        return ""
    p20, median, p80 = (f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2f}" for ratio in row.ratios[side])
    return f"{median} ({p20}-{p80})"


def model_table(rows: list[Row]) -> str:
    header = ("model", "work", "side", "tokens/s", "ours is faster by", "peak memory, MiB")
    cells = []
    for row in rows:
        if row.tokens is None:
            continue
        for side, ms in row.ms.items():
            peak = f"{row.peak_mib[side]:.0f}" if side in row.peak_mib else ""
            cells.append((row.shape, row.op, side, f"{row.tokens / ms * 1e3:.1f}", _ratio(row, side), peak))
    return markdown(header, cells)


def readme_section(rows: list[Row], about: dict[str, str], path: Path, folder: Path) -> list[str]:
    """The paragraphs of the README about results/<path>: the goals, the lost ones included, and a picture."""
    goals = markdown(GOAL_HEADER, goal_rows(rows))
    return [_provenance(rows, about), goals, f"{rule(rows)}.", *_pictures(path, folder, ("speed",))]


def speed_section(rows: list[Row], about: dict[str, str], path: Path, folder: Path) -> list[str]:
    """Those of docs/speed.md: the goals, the rows of SHAPE, the models and the pictures."""
    every = f"""Every {SHAPE} row of that run with {_threads(rows)} threads; all others are in the CSV. `floor` is the
        share of the floor. The last columns say how many times faster ours is than bitsandbytes' layer (the faster of
        its two in that row), torch's INT4, ggml's IQ4_NL and dense bf16 (a copy of it beside dequantize), each as the
        median of the rounds' ratios with their 20th and 80th percentile. {_of_disturbed(rows)}Not cached:"""
    parts = [_provenance(rows, about), markdown(GOAL_HEADER, goal_rows(rows)), _wrapped(every), op_table(rows, "out")]
    parts += ["The same weight over and over, cached:", op_table(rows, "in")]
    for isa in dict.fromkeys(row.isa for row in rows if row.isa):
        forced = f"With `{isa}` forced on ours, torch, oneDNN and MKL, not cached; the floor is at dense fp32's rate:"
        parts += [_wrapped(forced), forced_table(rows, isa)]
    if any(row.tokens for row in rows):
        parts += ["A whole model; the memory is that of the process at its peak:", model_table(rows)]
    parts.append(f"**The rule: {rule(rows)}.**")
    return parts + rule_lists(rows) + _pictures(path, folder, ("speed", "floor"))


def _of_disturbed(rows: list[Row]) -> str:
    count = sum(is_disturbed(row.others) for row in rows)
    return f"{MARK} marks what other processes ran beside, {count} of {len(rows)} rows. " if count else ""


def _threads(rows: list[Row]) -> int:
    return max(row.threads for row in rows)


def _provenance(rows: list[Row], about: dict[str, str]) -> str:
    ggml = f"ggml {about['ggml']}, " if about.get("ggml") else ""
    return _wrapped(
        f"On {about['machine']}, {_threads(rows)} threads, {about['kernels']} kernels, torch {about['torch']}, "
        f"bitsandbytes {about['bitsandbytes']}, {ggml}commit {about['commit']}, {about['date']}, by "
        f"`{about['command']}`:"
    )


def _wrapped_item(text: str) -> str:
    return textwrap.fill(f"- {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False, break_long_words=False)


def _pictures(path: Path, folder: Path, kinds: Iterable[str]) -> list[str]:
    what = {"speed": "Speed-up over dense bf16 against M", "floor": "Share of the floor"}
    pictures = {kind: path.with_name(f"{path.stem}-{kind}.png") for kind in kinds}
    return [f"![{what[kind]}]({os.path.relpath(file, folder)})" for kind, file in pictures.items() if file.exists()]


SECTIONS = {README: readme_section, SPEED: speed_section, SPEED_AMX: speed_section}
MARKED = re.compile(r"<!-- speed: (\S+) -->\n.*?\n<!-- end of speed -->", flags=re.DOTALL)


def named_in(document: Path) -> Path:
    """The CSV that a document's speed section is made of."""
    return RESULTS / MARKED.search(document.read_text(encoding="utf-8"))[1]


def with_section(document: Path, path: Path | None = None) -> str:
    """The text of a document of SECTIONS with its speed section made anew: of that CSV, if it is one for this document,
    else of the one that the document names.

    A run of kernels on AMX is for SPEED_AMX, every other for the other documents.
    """
    is_for_it = path is not None and ("amx" in read_csv(path)[1]["kernels"]) == (document == SPEED_AMX)
    path = path if is_for_it else named_in(document)
    section = "\n\n".join(SECTIONS[document](*read_csv(path), path, document.parent))
    marked = f"<!-- speed: {path.name} -->\n{section}\n<!-- end of speed -->"
    return MARKED.sub(lambda _: marked, document.read_text(encoding="utf-8"))
