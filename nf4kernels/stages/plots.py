"""The pictures of `inspect` and `compare`, each written whole or not at all."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..storage.atomic import replacing
from .compare.losses import TunedComparison, mean_and_spread
from .compare.text import Comparison
from .errors import StageError
from .inspect import Inspection, kinds_of

FORMATS = ("png", "svg", "pdf")
MARKERS = {"nf4": "o", "fp4": "s", "int4": "^", "af4": "D", "mxfp4": "P", "nvfp4": "X"}
LINES = {"e4m3": "-", "dynamic8": "--", "float32": ":"}


def check_plot(path: Path) -> None:
    """StageError unless a picture can be written there; to be called before anything is computed."""
    if path.suffix[1:].lower() not in FORMATS:
        raise StageError(f"--plot must end with .{', .'.join(FORMATS)}, got {path}")
    if not path.parent.is_dir():
        raise StageError(f"--plot must be a file in a directory that exists, got {path}")


def plot_inspection(path: Path, inspection: Inspection) -> None:
    """Relative error of each layer, where there is one, and the spread of its scales; one colour a kind of layer."""
    panels = (["error"] if inspection.dense else []) + ["scales"]
    figure = Figure(figsize=(11, 4.2 * len(panels)), layout="constrained")
    all_axes: list[Any] = list(figure.subplots(len(panels), squeeze=False)[:, 0])
    for panel, axes in zip(panels, all_axes):
        for color, (kind, layers) in enumerate(kinds_of(inspection.layers)):
            depth, style = range(len(layers)), {"color": f"C{color % 10}", "marker": "o", "markersize": 3}
            if panel == "error":
                axes.plot(depth, [100 * (x.rms_error or 0) for x in layers], label=kind, linewidth=0.8, **style)
            else:
                axes.plot(depth, [x.scales.median for x in layers], label=kind, linewidth=1, **style)
                low, high = [x.scales.p5 for x in layers], [x.scales.p95 for x in layers]
                axes.fill_between(depth, low, high, color=f"C{color % 10}", alpha=0.12, linewidth=0)
        axes.set_xlabel("layer of its kind, from input to output")
    if inspection.dense:
        first = inspection.layers[0]
        all_axes[0].axhline(100 * (inspection.rms_error or 0), color="0.4", linestyle="--", label="all layers")
        title = f"error of {first.codebook} in blocks of {first.block_size}: |Ŵ - W| / |W|"
        all_axes[0].set(ylabel="relative RMS error, %", title=title)
    all_axes[-1].set(ylabel="scale of a block", title="scales: median, and the band from 5 % to 95 %")
    if all(layer.scales.p5 > 0 for layer in inspection.layers):
        all_axes[-1].set_yscale("log")
    save_figure(figure, all_axes, path)


def plot_comparison(path: Path, comparison: Comparison) -> None:
    """Bits a weight against KL to the dense model; a line joins the block sizes of one codebook and kind of scale."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes: Any = figure.subplots()
    lines: dict[tuple[str, str], list[Any]] = {}
    for row in comparison.rows:
        lines.setdefault((row.variant.codebook, row.variant.scales), []).append(row)
    colors = {codebook: f"C{i}" for i, codebook in enumerate(dict.fromkeys(codebook for codebook, _ in lines))}
    for (codebook, scales), rows in lines.items():
        rows = sorted(rows, key=lambda row: row.bits)
        axes.plot(
            [row.bits for row in rows], [row.kl for row in rows], color=colors[codebook], label=f"{codebook}, {scales}",
            marker=MARKERS.get(codebook, "o"), markersize=5, linewidth=1, linestyle=LINES.get(scales, "-"),
        )  # fmt: skip
        for row in rows:
            axes.annotate(
                str(row.variant.block_size), (row.bits, row.kl), textcoords="offset points", xytext=(4, 4), fontsize=6
            )
    if all(row.kl > 0 for row in comparison.rows):
        axes.set_yscale("log")
    axes.set(xlabel="bits a weight (with scales)", ylabel="KL to the dense model, nats a token")
    axes.set_title(f"{comparison.tokens} tokens; beside each point its block size")
    save_figure(figure, [axes], path)


def plot_finetunes(path: Path, comparison: TunedComparison) -> None:
    """Held-out loss before and after; and after, over the dense weights' of the same seed: mean, std, each seed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    both: Any
    over: Any
    both, over = figure.subplots(1, 2)
    labels = ["\n".join(filter(None, row.label)) for row in comparison.rows]
    places = range(len(labels))
    before = [mean_and_spread([run.before for run in row.runs]) for row in comparison.rows]
    after = [mean_and_spread(row.after) for row in comparison.rows]
    for losses, label, marker in ((before, "before", "o"), (after, "after", "D")):
        both.errorbar(
            places, [mean for mean, _ in losses], [std or 0 for _, std in losses], label=label, fmt=marker, capsize=4
        )
    for place, row in enumerate(comparison.rows):
        values = comparison.over_dense(row)
        mean, std = mean_and_spread(values)
        over.errorbar(place, mean, std or 0, fmt="D", color="C1", capsize=6)
        shifts = random.Random(0)
        over.scatter([place + shifts.uniform(0.1, 0.25) for _ in values], values, color="0.4", s=10)
    over.axhline(0, color="0.6", linewidth=0.8)
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) > 1 else ''}"
    both.set(ylabel="held-out loss, nats a token", title=f"before and after LoRA; mean and std over {seeds}")
    over.set(ylabel="nats a token", title="after, over dense weights with the same seed")
    for axes in (both, over):
        axes.set_xticks(places, labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    save_figure(figure, [both], path)


def save_figure(figure: Any, legends: Sequence[Any], path: Path) -> None:
    """Write the figure; `legends` are the axes that have one."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in legends:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix[1:].lower())
