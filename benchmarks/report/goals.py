"""What the kernels should reach on a CPU and on a GPU, as data, and how far a run's rows are from it.

Every goal of the CPU is on a 4096x4096 weight in no cache, with all threads; the last ones are on a whole model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..harness import BNB, BNB_DQ, DENSE, Row, Spread

FLOOR = "floor"
WITHOUT_LORA = "without LoRA"
EVERY_ROW = "every row"
SHAPE = "4096x4096"
MODEL_STEP = "qlora step"


@dataclass(frozen=True)
class Goal:
    """`at_least` times the speed of the side `than`, or that share of the floor."""

    op: str
    M: int | None
    than: str
    at_least: float
    shape: str = SHAPE

    @property
    def work(self) -> str:
        """What is measured: "linear, M=4", and the shape where it is not SHAPE."""
        work = self.op if self.M is None else f"{self.op}, M={self.M}"
        return work if self.shape == SHAPE else f"{work}, {self.shape}"

    @property
    def text(self) -> str:
        """What is to be reached: "2.4x dense bf16"."""
        return self.figure(self.at_least) + (" of the floor" if self.than == FLOOR else f" {self.than}")

    def figure(self, value: float) -> str:
        return f"{value:.0%}" if self.than == FLOOR else f"{value:.2f}x"

    def reached(self, rows: Iterable[Row]) -> Spread | None:
        """What the rows say, with all their threads; None where nobody measured it."""
        found = [row for row in rows if self._is_about(row)]
        if self.op == EVERY_ROW:
            return min((row.ratios[self.than] for row in found), key=lambda spread: spread[1], default=None)
        if not found:
            return None
        row = max(found, key=lambda row: row.threads)
        return row.share if self.than == FLOOR else row.ratios.get(self.than)

    def _is_about(self, row: Row) -> bool:
        if self.op == EVERY_ROW:
            return self.than in row.ratios
        if row.op != self.op:
            return False
        return self.op == MODEL_STEP or (row.shape == self.shape and row.M == self.M and row.cache == "out")


GOALS = (
    Goal("quantize", None, BNB_DQ, 50),
    Goal("quantize", None, FLOOR, 0.40),
    Goal("dequantize out=", None, BNB_DQ, 10),
    Goal("dequantize out=", None, FLOOR, 1.10),  # streaming stores need no read of the line, which copy_ does
    Goal("linear", 1, BNB, 1.8),
    Goal("linear", 1, DENSE, 3.5),
    Goal("linear", 4, BNB, 1.8),
    Goal("linear", 4, DENSE, 3.5),
    Goal("linear", 16, DENSE, 2.4),
    Goal("linear", 64, DENSE, 1.3),
    Goal("linear", 512, DENSE, 0.95),
    Goal("linear + dgrad", 16, DENSE, 2.0),
    Goal("linear + dgrad", 64, DENSE, 1.2),
    Goal("linear + dgrad", 512, DENSE, 0.95),
    Goal(MODEL_STEP, None, BNB, 2.5),
    Goal(MODEL_STEP, None, DENSE, 1 / 1.1),
)

LARGE = "28672x8192"  # 121 MB in 4 bits, more than the L2 of today's cards


def gpu_goals(decode_share: float) -> tuple[Goal, ...]:
    """The floor is at the card's own copy bandwidth and cuBLAS rate; `decode_share` of it suits HBM or GDDR."""
    return (
        Goal("dequantize out=", None, FLOOR, 0.90, LARGE),
        *(Goal("linear", M, FLOOR, decode_share, LARGE) for M in (1, 4, 16)),
        *(Goal("linear", M, than, 1.0) for M in (64, 256) for than in (DENSE, BNB_DQ)),
        *(Goal(op, M, DENSE, 0.95) for op in ("linear", "linear_dgrad") for M in (2048, 8192)),
        *(Goal("lora step", M, WITHOUT_LORA, 1 / 1.03) for M in (2048, 8192)),
        Goal(EVERY_ROW, None, BNB_DQ, 1.0),
    )


def goal_rows(rows: list[Row], goals: tuple[Goal, ...] = GOALS) -> Iterator[tuple[str, str, str, str, str]]:
    """(work, goal, median, p20-p80, verdict) of every goal."""
    for goal in goals:
        reached = goal.reached(rows)
        if reached is None:
            yield goal.work, f">= {goal.text}", "", "", "not measured"
            continue
        p20, median, p80 = (goal.figure(value) for value in reached)
        yield goal.work, f">= {goal.text}", median, f"{p20}-{p80}", "met" if reached[1] >= goal.at_least else "not met"
