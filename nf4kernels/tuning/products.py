"""What is timed: a product of some rows with a weight, by a candidate, a way to run it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..backends.tuned_table import ANY_ROWS, MOST_COST, Config, CudaOp, Tile
from .search import Budget

Shape = tuple[int, int]  # of the weight, N and K
SHAPES: tuple[Shape, ...] = ((4096, 4096), (14336, 4096), (4096, 14336))  # of 8B models
EXPERTS, EXPERT_SHAPES = 16, ((1536, 2048), (2048, 4096))


@dataclass(frozen=True)
class Product:
    op: str
    M: int  # rows of each weight
    shape: Shape
    experts: int = 0  # 0: one weight

    @property
    def rows(self) -> int:
        return self.M * max(self.experts, 1)

    def __str__(self) -> str:
        experts = f"{self.experts} x " if self.experts else ""
        return f"{self.op} {experts}{self.shape[0]}x{self.shape[1]} M={self.M}"


@dataclass(frozen=True)
class Native:
    """The compiled library by one kernel; "": as it is tuned."""

    kernel: str = ""
    tile: int = 0
    blocks: int = 1

    def only(self, tiles: Sequence[str]) -> CudaOp:
        """The parameters by which choose.h takes this kernel wherever it can run."""
        small = ANY_ROWS if self.kernel == "small" else 0
        tiled = 0 if self.kernel == "dequantize_gemm" else ANY_ROWS
        rows = [ANY_ROWS if number >= self.tile else 0 for number in range(len(tiles))]
        costs = [1 if number == self.tile else MOST_COST for number in range(len(tiles))]
        return CudaOp(small, tiled, tuple(map(Tile, tiles, rows, costs, [self.blocks] * len(tiles))))


@dataclass(frozen=True)
class Triton:
    path: str
    config: Config


Candidate = Native | Triton
# Milliseconds of each candidate that can run; they take turns. Raises OutOfTimeError.
Times = Callable[[Product, Sequence[Candidate], Budget], Mapping[Candidate, float]]


def mean_logarithm(values: Sequence[float]) -> float:
    """Of the geometric mean; of nothing: infinity."""
    return sum(map(math.log, values)) / len(values) if values else math.inf
