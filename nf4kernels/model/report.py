"""What quantizing did, layer by layer, and the one printer of tables."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class QuantizedLayer:
    """One replaced weight: its bytes before and after, and the sums behind its relative RMS error.

    `name` is the layer's, and of experts that of one of their two weights; `shape` is [N, K] or [E, N, K].
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    squared_error: float
    squared_weight: float

    @property
    def kind(self) -> str:
        """The last component of the name: "q_proj"."""
        return self.name.rpartition(".")[2]

    @property
    def rms_error(self) -> float:
        """|Ŵ - W| / |W|; 0 for an all-zero weight, NaN on the meta device."""
        return relative_rms_error([self])


@dataclass(frozen=True)
class SkippedLayer:
    """One matrix that was left alone, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_model` did; `str()` of it is a table.

    Attributes:
        layers: the replaced layers, in the model's order.
        skipped: the matrices left alone.
        model_bytes_before, model_bytes_after: all parameters and buffers of the model, shared ones counted once.
    """

    layers: list[QuantizedLayer] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)
    model_bytes_before: int = 0
    model_bytes_after: int = 0

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def rms_error(self) -> float:
        """|Ŵ - W| / |W| over all replaced weights together."""
        return relative_rms_error(self.layers)

    def by_kind(self) -> dict[str, list[QuantizedLayer]]:
        """The replaced layers grouped by the last component of their names."""
        kinds = defaultdict(list)
        for layer in self.layers:
            kinds[layer.kind].append(layer)
        return dict(kinds)

    def summary(self) -> str:
        """The table without its rows for single layers."""
        return self._text([])

    def __str__(self) -> str:
        return self._text([*(_row(layer.name, _shape(layer.shape), [layer]) for layer in self.layers), None])

    def _text(self, layer_rows: list) -> str:
        rows = [("layer", "shape", "before", "after", "bits/weight", "RMS error"), *layer_rows]
        for kind, layers in self.by_kind().items():
            shapes = {_shape(layer.shape) for layer in layers}
            rows.append(_row(f"all {kind} ({len(layers)})", shapes.pop() if len(shapes) == 1 else "", layers))
        rows.append(_row(f"all quantized ({len(self.layers)})", "", self.layers))
        rows.append(("whole model", "", _size(self.model_bytes_before), _size(self.model_bytes_after), "", ""))
        text = table(rows)
        if self.skipped:
            skipped = [("left alone", "shape", "bytes", "reason")]
            skipped += [(s.name, _shape(s.shape), _size(s.bytes), s.reason) for s in self.skipped]
            text += "\n\n" + table(skipped, left=(0, 3))
        return text


def relative_rms_error(layers: Iterable[QuantizedLayer]) -> float:
    """|Ŵ - W| / |W| over all these layers together."""
    layers = list(layers)
    weight = sum(layer.squared_weight for layer in layers)
    error = sum(layer.squared_error for layer in layers)
    return math.sqrt(error / weight) if weight else error


def _row(name: str, shape: str, layers: list[QuantizedLayer]) -> tuple[str, ...]:
    before = sum(layer.bytes_before for layer in layers)
    after = sum(layer.bytes_after for layer in layers)
    weights = sum(math.prod(layer.shape) for layer in layers)
    bits = f"{8 * after / weights:.3f}" if weights else "-"
    return name, shape, _size(before), _size(after), bits, f"{relative_rms_error(layers):.4f}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.2f} KiB"


def table(rows: Sequence[tuple[str, ...] | None], left: tuple[int, ...] = (0,)) -> str:
    """Columns as wide as their widest cell: those in `left` are aligned to the left, the others to the right.

    The first row is the heading, and a rule follows it; a None row is a rule, too.
    """
    cells = [row for row in rows if row is not None]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [
        rule if row is None
        else "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join([lines[0], rule, *lines[1:]])
