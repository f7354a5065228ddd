"""The pictures of a run: speed against M, and the share of the floor that each row reaches."""

import io
from pathlib import Path

from ..harness import BNB, BNB_DQ, DENSE, INT4, OURS, Row
from ..shapes import FOCUS

# told apart by the colour-blind too
COLORS = {OURS: "#0072b2", BNB: "#d55e00", BNB_DQ: "#cc79a7", INT4: "#009e73", DENSE: "#555555"}
MARKERS = {OURS: "o", BNB: "s", BNB_DQ: "^", INT4: "D"}
SHAPES = tuple(f"{N}x{K}" for N, K in FOCUS)


def draw(rows: list[Row], about: dict[str, str], csv_path: Path) -> list[Path]:
    """The pictures of a CPU's run beside its CSV."""
    threads = max(row.threads for row in rows)
    chosen = [row for row in rows if row.threads == threads and row.cache == "out" and row.shape in SHAPES]
    chosen = [row for row in chosen if row.is_usual]
    return draw_rows(chosen, f"{about['machine']}; {threads} threads", csv_path)


def draw_rows(chosen: list[Row], machine: str, csv_path: Path) -> list[Path]:
    """Two pictures beside the CSV, as far as there are rows for them."""
    where = f"{machine}; so many weights in turn that no cache holds them"
    pictures = []
    for kind, figure in (("speed", _speed(chosen, where)), ("floor", _floor(chosen, where))):
        if figure is not None:
            pictures.append(csv_path.with_name(f"{csv_path.stem}-{kind}.png"))
            _save(figure, pictures[-1])
    return pictures


def _save(figure, path: Path) -> None:
    """In 64 colours: a third of the bytes. On white: dark text on a transparent ground is lost on a dark page."""
    from PIL import Image

    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=110, facecolor="white")
    Image.open(pixels).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _speed(rows: list[Row], where: str):
    """One subplot an op and shape: speed-up over dense bf16 against M."""
    from matplotlib.figure import Figure

    ops = [op for op in ("linear", "linear_dgrad", "linear + dgrad", "lora step") if any(row.op == op for row in rows)]
    if not ops:
        return None
    shapes = _shapes_of(rows)
    ticks = sorted({row.M for row in rows if row.op in ops})
    figure = Figure(figsize=(9, 0.9 + 2.2 * len(ops)), layout="constrained")
    figure.suptitle(f"How many times faster than dense bf16\n{where}", fontsize=11)
    grid = figure.subplots(len(ops), len(shapes), squeeze=False, sharex=True, sharey="row")
    for op, line in zip(ops, grid):
        for shape, axes in zip(shapes, line):
            mine = sorted((row for row in rows if row.op == op and row.shape == shape), key=lambda row: row.M)
            _speed_subplot(axes, mine)
            axes.set_title(f"{op}, {shape}", fontsize=10)
        line[0].set_ylabel("speed-up")
        line[0].set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set_xlabel("M, rows of x")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(M) for M in ticks])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def _speed_subplot(axes, rows: list[Row]) -> None:
    for side in [side for side in MARKERS if all(side in row.ms for row in rows)]:
        speed = [row.ratios[DENSE][1] if side == OURS else row.ms[DENSE] / row.ms[side] for row in rows]
        style = {"color": COLORS[side], "marker": MARKERS[side], "label": side, "markersize": 5}
        front = side == OURS
        axes.plot([row.M for row in rows], speed, linewidth=2.2 if front else 1.4, zorder=3 if front else 2, **style)
    low, high = [row.ratios[DENSE][0] for row in rows], [row.ratios[DENSE][2] for row in rows]
    axes.fill_between(
        [row.M for row in rows], low, high, color=COLORS[OURS], alpha=0.2, linewidth=0, label="its p20-p80"
    )
    axes.axhline(1, color=COLORS[DENSE], linestyle="--", linewidth=1.2, label=DENSE)
    axes.minorticks_off()
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _shapes_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.shape for row in rows))


def _floor(rows: list[Row], where: str):
    """One bar a row: the floor over our time, with its p20-p80."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.share]
    if not rows:
        return None
    shapes = _shapes_of(rows)
    most = max(sum(row.shape == shape for row in rows) for shape in shapes)
    figure = Figure(figsize=(9, 1.3 + 0.24 * most), layout="constrained")
    figure.suptitle(f"Share of the machine's own limit that nf4kernels reaches\n{where}", fontsize=11)
    for shape, axes in zip(shapes, figure.subplots(1, len(shapes), sharex=True, squeeze=False)[0]):
        mine = [row for row in rows if row.shape == shape]
        low, middle, high = zip(*(row.share for row in mine))
        places = range(len(mine))
        axes.barh(places, [100 * share for share in middle], color=COLORS[OURS], height=0.7, label="median")
        edges = [[100 * (m - e) for m, e in zip(middle, low)], [100 * (e - m) for m, e in zip(middle, high)]]
        axes.errorbar(
            [100 * share for share in middle], places, xerr=edges, fmt="none", ecolor="black", elinewidth=1,
            capsize=2, label="p20-p80",
        )  # fmt: skip
        axes.axvline(100, color=COLORS[DENSE], linestyle="--", linewidth=1.2, label="the limit")
        axes.set_yticks(places, [row.op if row.M is None else f"{row.op}, M={row.M}" for row in mine], fontsize=9)
        axes.invert_yaxis()
        axes.set_title(shape, fontsize=10)
        axes.set_xlabel("share of the floor, %")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
