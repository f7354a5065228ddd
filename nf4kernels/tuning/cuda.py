"""The parameters of csrc/cuda/choose.h for the present card.

Up to how many rows each kernel and tile runs, and how many blocks split-K is to fill.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..backends.tuned_table import ANY_ROWS, CudaOp, Tile
from .products import EXPERT_SHAPES, EXPERTS, SHAPES, Native, Product, Shape, Times, mean_logarithm
from .search import Budget, OutOfTimeError, best_ranges, limit_between

ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
EXPERT_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BLOCKS = (1, 2, 3, 4)  # that are tried, of a multiprocessor
MOST_TILES_OF_M = 4  # that small and a tile are timed with, a tile while there is a larger one
SMALL_ROWS, LEAST_GEMM_ROWS = 16, 16
# From this many rows on, no more are measured once dequantize + GEMM is so many times faster than what is fused.
MANY_ROWS, CLEARLY = 256, 1.25


@dataclass(frozen=True)
class CudaLibrary:
    """What is asked of the library: the kernel, tile and splits that a candidate has for a product, or None where it
    cannot run it; and the tiles of an op, "MxNxK"."""

    choice: Callable[[Product, Native], tuple[str, int, int] | None]
    tiles: Callable[[str], list[str]]


class OpSearch:
    """The search for one op; `solve` after each shape, or when the time is over."""

    def __init__(self, op: str, library: CudaLibrary, times: Times) -> None:
        self.op, self.library, self.times = op, library, times
        self.tiles = library.tiles(op)
        self.experts = EXPERTS if op.startswith("grouped_") else 0
        self.shapes: Sequence[Shape] = EXPERT_SHAPES if self.experts else SHAPES
        self.rows = EXPERT_ROWS if self.experts else ROWS
        small = [] if op.endswith("dgrad") else [("small", 0)]
        self.order = [*small, *(("tiled", tile) for tile in range(len(self.tiles))), ("dequantize_gemm", 0)]
        self.measured: dict[Shape, dict[int, dict[Native, float]]] = {}

    def measure(self, shape: Shape, budget: Budget) -> None:
        """Times of every candidate at every M; nothing is kept of a shape for which the time did not suffice."""
        found: dict[int, dict[Native, float]] = {}
        for M in self.rows:
            found[M] = self._times(Product(self.op, M, shape, self.experts), budget)
            best: dict[str, float] = defaultdict(lambda: math.inf)
            for candidate, ms in found[M].items():
                best[candidate.kernel] = min(best[candidate.kernel], ms)
            if M >= MANY_ROWS and best["dequantize_gemm"] * CLEARLY < best["tiled"]:
                break
        self.measured[shape] = found

    def _times(self, product: Product, budget: Budget) -> dict[Native, float]:
        alike: dict[tuple[str, int, int], list[Native]] = {}  # candidates that are the same launch
        for kernel, tile in self.order:
            if not self._is_for(product.M, kernel, tile):
                continue
            for blocks in BLOCKS:
                candidate = Native(kernel, tile, blocks)
                choice = self.library.choice(product, candidate)
                if choice is not None:
                    alike.setdefault(choice, []).append(candidate)
        times = self.times(product, [same[0] for same in alike.values()], budget)
        return {candidate: times[same[0]] for same in alike.values() if same[0] in times for candidate in same}

    def _is_for(self, M: int, kernel: str, tile: int) -> bool:
        if kernel == "dequantize_gemm":
            return M >= LEAST_GEMM_ROWS
        if kernel == "tiled" and tile == len(self.tiles) - 1:
            return True
        own = SMALL_ROWS if kernel == "small" else int(self.tiles[tile].partition("x")[0])
        return MOST_TILES_OF_M * own >= M

    def solve(self, budget: Budget) -> CudaOp | None:
        """None: no shape was measured."""
        if not self.measured:
            return None
        every_m = set.intersection(*(set(found) for found in self.measured.values()))
        costs: dict[tuple[str, int], dict[int, dict[int, float]]] = {}  # kernel -> blocks -> M -> cost
        for kernel in self.order:
            costs[kernel] = {blocks: self._costs(Native(*kernel, blocks), every_m) for blocks in BLOCKS}
        least = {
            kernel: {M: min(cost.get(M, math.inf) for cost in own.values()) for M in every_m}
            for kernel, own in costs.items()
        }
        ranges = best_ranges(least, self.order)
        blocks = {kernel: self._best_blocks(costs[kernel], ranges, kernel) for kernel in self.order}
        chosen = {kernel: Native(*kernel, blocks[kernel]) for kernel in self.order}
        ranges = best_ranges({kernel: costs[kernel][blocks[kernel]] for kernel in self.order}, self.order)
        limits = self._limits(ranges, chosen, budget)
        tiled = [limits[kernel] for kernel in self.order if kernel[0] == "tiled"]
        tiles = (
            Tile(name, ANY_ROWS if i == len(tiled) - 1 else tiled[i], blocks["tiled", i])
            for i, name in enumerate(self.tiles)
        )
        return CudaOp(limits.get(("small", 0), 0), blocks.get(("small", 0), 1), tiled[-1], tuple(tiles))

    def _costs(self, candidate: Native, every_m: set[int]) -> dict[int, float]:
        """M -> the mean over the shapes, where it runs all of them."""
        found = {}
        for M in every_m:
            values = [own[M].get(candidate, math.inf) for own in self.measured.values()]
            if max(values) < math.inf:
                found[M] = mean_logarithm(values)
        return found

    @staticmethod
    def _best_blocks(costs: Mapping[int, Mapping[int, float]], ranges: dict[int, tuple], kernel: tuple) -> int:
        """The number with the least time over the kernel's own range; the least number of those that are alike."""
        own = [M for M, runs in ranges.items() if runs == kernel]
        return min(costs, key=lambda blocks: (sum(costs[blocks].get(M, math.inf) for M in own), blocks))

    def _limits(self, ranges: dict[int, tuple], chosen: Mapping[tuple, Native], budget: Budget) -> dict[tuple, int]:
        """kernel -> its most rows; a kernel without a range has those of the one before it."""
        all_m, limits, last = list(ranges), {}, 0
        for kernel in self.order:
            own = [M for M in all_m if ranges[M] == kernel]
            if own:
                after = next((M for M in all_m if own[-1] < M), None)
                if after is None:
                    last = ANY_ROWS
                else:
                    stays = partial(self._is_faster, chosen[kernel], chosen[ranges[after]], budget)
                    last = limit_between(own[-1], after, stays)
            limits[kernel] = last
        return limits

    def _is_faster(self, first: Native, second: Native, budget: Budget, M: int) -> bool:
        difference = 0.0
        for shape in self.measured:
            times = self.times(Product(self.op, M, shape, self.experts), (first, second), budget)
            difference += math.log(times.get(first, math.inf)) - math.log(times[second])
        return difference <= 0


def tune_cuda(library: CudaLibrary, times: Times, ops: Sequence[str], shapes: int, budget: Budget) -> dict[str, CudaOp]:
    """op -> its parameters, of the ops that there was time for: each with its first shape, then each with the next."""
    searches = [OpSearch(op, library, times) for op in ops]
    measuring, refining = budget.part(0.8), budget
    try:
        for number in range(shapes):
            for search in searches:
                if number < len(search.shapes):
                    search.measure(search.shapes[number], measuring)
    except OutOfTimeError:
        pass
    solved = {search.op: search.solve(refining) for search in searches}
    return {op: own for op, own in solved.items() if own is not None}
