"""The picture of a plan: what each layer costs alone, and what becomes of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ...recover.candidates import Candidate
from ...recover.plan import Plan
from ...recover.sensitivity import Option, Sensitivities
from ..plots import save_figure

COLORS = "tab20"  # of candidates


def plot_plan(path: Path, found: Sensitivities, plan: Plan) -> None:
    """KL of the first candidate in 4 bits for each layer, by kind and depth; below, one square a layer."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    costs: Any
    grid: Any
    costs, grid = figure.subplots(2, 1)
    first = next((o.candidate for o in found.options if not (o.candidate.is_dense or o.candidate.dropped)), None)
    for color, (kind, options) in enumerate(_by_kind([o for o in found.options if o.candidate == first]).items()):
        style = {"color": f"C{color % 10}", "marker": "o", "markersize": 3, "linewidth": 0.8}
        costs.plot(range(len(options)), [option.kl for option in options], label=kind, **style)
    if any(option.kl > 0 for option in found.options if option.candidate == first):
        costs.set_yscale("log")
    title = f"KL when these layers alone are {first.name if first else 'changed'}"
    costs.set(ylabel="nats a token", xlabel="layer of its kind, from input to output", title=title)
    _draw_choices(figure, grid, plan)
    save_figure(figure, [costs], path)


def _by_kind(options: Sequence[Option]) -> dict[str, list[Option]]:
    found: dict[str, list[Option]] = {}
    for option in options:
        found.setdefault(", ".join(name.rpartition(".")[2] for name in option.layers), []).append(option)
    return found


def _draw_choices(figure: Figure, axes: Any, plan: Plan) -> None:
    kinds: dict[str, list[Candidate]] = {}
    for name, candidate in plan.layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(candidate)
    names = sorted({candidate.name for candidate in plan.layers.values()})
    width = max(map(len, kinds.values()))
    cells = [[names.index(c.name) for c in row] + [float("nan")] * (width - len(row)) for row in kinds.values()]
    colors = ListedColormap(colormaps[COLORS](range(len(names))))
    image = axes.imshow(cells, aspect="auto", cmap=colors, vmin=-0.5, vmax=len(names) - 0.5, interpolation="none")
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set(xlabel="layer of its kind, from input to output",
             title=f"the plan: {plan.bits:.3f} bits a weight, expected KL {plan.kl:.4f} nats a token")  # fmt: skip
    bar = figure.colorbar(image, ax=axes, ticks=range(len(names)))
    bar.ax.set_yticklabels(names)
