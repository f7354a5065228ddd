"""What the kernels should reach on a CPU and on a GPU, as data, and how far a run's rows are from it.

The goals are those of docs/design.md, section 9. Those of the CPU are on a 4096x4096 weight in no cache, with all
threads, if they say nothing else; the last ones are on a whole model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..harness import BNB, BNB_DQ, DENSE, DTYPES, GGML, INT4, OURS, Row, Spread, dense_side, of_bitsandbytes

FLOOR = "floor"
WITHOUT_LORA = "without LoRA"
EVERY_ROW = "every row"
SHAPE = "4096x4096"
LONG_K = 11008
LONG_ROWS = f"K >= {LONG_K}"
MODEL_STEP = "qlora step"
PEERS = (BNB, BNB_DQ, INT4, *GGML, *map(dense_side, DTYPES))  # whom no row may be slower than


@dataclass(frozen=True)
class Goal:
    """`at_least` times the speed of the side `than`, or that share of the floor; of several rows the worst one counts.

    BNB means the faster of bitsandbytes' two layers in a row.
    The shape LONG_ROWS means every weight whose rows are that long, and several M every one of them.
    """

    op: str
    M: int | tuple[int, ...] | None
    than: str
    at_least: float
    shape: str = SHAPE

    @property
    def work(self) -> str:
        """What is measured: "linear, M=4", and the shape where it is not SHAPE."""
        M = f"{self.M[0]}..{self.M[-1]}" if isinstance(self.M, tuple) else self.M
        work = self.op if M is None else f"{self.op}, M={M}"
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
        threads = max((row.threads for row in found), default=0)
        if self.op != EVERY_ROW:
            found = [row for row in found if row.threads == threads]
        figures = map(self._figure_in, found)
        return min((figure for figure in figures if figure), key=lambda spread: spread[1], default=None)

    def _figure_in(self, row: Row) -> Spread | None:
        if self.than == FLOOR:
            return row.share
        side = of_bitsandbytes(row) if self.than == BNB else self.than
        return None if side is None else row.ratios.get(side)

    def _is_about(self, row: Row) -> bool:
        if self.op == EVERY_ROW:
            return self._figure_in(row) is not None
        if row.op != self.op or not row.is_usual:
            return False
        if self.op == MODEL_STEP:
            return True
        rows = self.M if isinstance(self.M, tuple) else (self.M,)
        return self._is_of(row.shape) and row.M in rows and row.cache == "out"

    def _is_of(self, shape: str) -> bool:
        return int(shape.split("x")[-1]) >= LONG_K if self.shape == LONG_ROWS else shape == self.shape


GOALS = (
    Goal("quantize", None, BNB_DQ, 100),
    Goal("quantize", None, FLOOR, 0.60),
    Goal("dequantize out=", None, FLOOR, 0.90),
    Goal("linear", 1, BNB, 1.2),
    Goal("linear", 1, INT4, 1.1),
    Goal("linear", 1, DENSE, 4.0),
    Goal("linear", (1, 2, 3, 4), BNB, 1.1, LONG_ROWS),
    Goal("linear", (1, 2, 3, 4), INT4, 1.1, LONG_ROWS),
    Goal("linear", 4, BNB, 1.0),
    Goal("linear", 4, DENSE, 2.3),
    Goal("linear", 16, BNB, 1.2),
    Goal("linear", 16, DENSE, 1.5),
    Goal("linear", 64, BNB, 1.3),
    Goal("linear", 64, DENSE, 1.08),
    Goal("linear", 512, BNB, 1.3),
    Goal("linear", 512, DENSE, 0.95),
    Goal("linear + dgrad", 16, BNB, 2.5),
    Goal("linear + dgrad", 16, DENSE, 1.6),
    Goal("linear + dgrad", 64, BNB, 1.9),
    Goal("linear + dgrad", 64, DENSE, 1.1),
    Goal("linear + dgrad", 512, BNB, 1.1),
    Goal("linear + dgrad", 512, DENSE, 0.95),
    Goal(MODEL_STEP, None, BNB, 1.1),
    Goal(MODEL_STEP, None, DENSE, 0.95),
    *(Goal(EVERY_ROW, None, side, 1.0) for side in (BNB, INT4, *GGML, DENSE)),
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


def broken(rows: Iterable[Row]) -> list[tuple[Row, dict[str, Spread]]]:
    """The rule: not slower than any peer. (row, the peers that were faster in it) of each row that breaks it."""
    found = []
    for row in rows:
        faster = {side: ratio for side, ratio in row.ratios.items() if side in PEERS and ratio[1] < 1}
        if faster:
            found.append((row, faster))
    return found


def rule(rows: Iterable[Row]) -> str:
    """In how many of how many rows the rule holds."""
    judged = [row for row in rows if OURS in row.ms and any(side in PEERS for side in row.ratios)]
    return f"{len(judged) - len(broken(judged))} of {len(judged)} rows are not slower than any peer"
