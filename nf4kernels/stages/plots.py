"""The pictures of `inspect` and `compare`, each written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..storage.atomic import replacing
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
    _save(figure, all_axes, path)


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
    _save(figure, [axes], path)


def _save(figure: Any, all_axes: Sequence[Any], path: Path) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix[1:].lower())
