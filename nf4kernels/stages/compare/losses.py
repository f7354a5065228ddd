"""What came of fine-tunes that differ in their weights and their seeds alone: a table."""

from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ...model.report import table
from .variants import Variant


@dataclass(frozen=True)
class Run:
    """One fine-tune's held-out loss before and after it, nats a token."""

    seed: int
    before: float
    after: float


@dataclass(frozen=True)
class TunedVariant:
    """The runs of one way to store the weights, which `variant` None leaves dense."""

    variant: Variant | None
    runs: list[Run]

    @property
    def label(self) -> tuple[str, str, str]:
        """Codebook, block size and kind of scale."""
        its = self.variant
        return ("dense", "", "") if its is None else (its.codebook, str(its.block_size), its.scales)

    @property
    def before(self) -> float:
        """The mean over the seeds."""
        return fmean(run.before for run in self.runs)

    @property
    def after(self) -> list[float]:
        return [run.after for run in self.runs]


@dataclass(frozen=True)
class TunedComparison:
    """LoRA on dense weights and on each variant, of the same examples, seeds and recipe.

    Attributes:
        examples, tokens: trained on in an epoch.
        held_out: how many examples the losses are of, the same in all runs.
        dtype: what is not in 4 bits computes in it, as "bfloat16".
        rows: the dense weights first, then the variants; each has its runs in the same order of seeds.
    """

    examples: int
    tokens: int
    held_out: int
    dtype: str
    rows: list[TunedVariant]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.rows[0].runs]

    def over_dense(self, row: TunedVariant) -> list[float]:
        """The loss after, less that of the dense weights after the same seed's run."""
        return [after - dense for after, dense in zip(row.after, self.rows[0].after)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = []
        for row in self.rows:
            named = {"codebook": "dense"} if row.variant is None else vars(row.variant)
            (after, spread), (over, over_spread) = mean_and_spread(row.after), mean_and_spread(self.over_dense(row))
            rows.append({
                **named, "before": row.before, "after": after, "after_std": spread, "after_min": min(row.after),
                "after_max": max(row.after), "over_dense": over, "over_dense_std": over_spread,
                "runs": [vars(run) for run in row.runs],
            })  # fmt: skip
        return {name: value for name, value in vars(self).items() if name != "rows"} | {"variants": rows}

    def __str__(self) -> str:
        """Means over seeds, and beside them the sample's standard deviation and the range."""
        rows: list[tuple[str, ...] | None] = [
            ("codebook", "block", "scales", "before", "after", "std", "min .. max", "over dense", "std")
        ]
        for row in self.rows:
            (after, spread), (over, over_spread) = mean_and_spread(row.after), mean_and_spread(self.over_dense(row))
            paired = ("", "") if row.variant is None else (f"{over:+.4f}", _shown(over_spread))
            between = f"{min(row.after):.4f} .. {max(row.after):.4f}"
            rows.append((*row.label, f"{row.before:.4f}", f"{after:.4f}", _shown(spread), between, *paired))
        return table(rows, left=(0, 2))


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of the sample (over n - 1), which a single value has not."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def _shown(spread: float | None) -> str:
    return "-" if spread is None else f"{spread:.4f}"
