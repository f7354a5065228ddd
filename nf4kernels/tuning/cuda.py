"""The parameters of csrc/cuda/choose.h and tiles.h for the present card.

Up to how many rows each kernel runs; of one weight, how far the prediction of each tile's time is off and how many
blocks its splits are to fill; of experts, up to how many rows each tile runs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from ..backends.tuned_table import ANY_ROWS, MOST_COST, CudaOp, Tile
from .products import EXPERT_SHAPES, EXPERTS, SHAPES, Native, Product, Shape, Times, mean_logarithm
from .search import Budget, NoKernelError, OutOfTimeError, best_ranges, limit_between

ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
EXPERT_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BLOCKS = (1, 2, 3, 4)  # that are tried, of a multiprocessor
SMALL_ROWS = 64  # most rows of an expert, that small is timed with
LEAST_GEMM_ROWS = 16
# From this many rows on, no more are measured once dequantize + GEMM is so many times faster than what is fused.
MANY_ROWS, CLEARLY = 256, 1.25
# A tile's own rows are those where it takes at most so many times what the best tile does.
NEAR = 1.25

Kernel = tuple[str, int]  # and its tile
SMALL, GEMM, TILED = ("small", 0), ("dequantize_gemm", 0), ("tiled", -1)  # by the tile that is chosen


class CudaLibrary(Protocol):
    """What is asked of the library."""

    def tiles(self, op: str) -> list[str]:
        """Of the op, "MxNxK" each."""

    def choice(self, product: Product, candidate: Native) -> tuple[str, int, int] | None:
        """The kernel, tile and splits of a candidate; None where it cannot run."""

    def tile_of(self, product: Product, own: CudaOp) -> int:
        """The tile that tiled has for a product by these parameters."""

    def cycles(self, product: Product, tile: int, blocks: int) -> float:
        """What is predicted for one weight's product by a tile."""


class OpSearch:
    """The search for one op; `solve` after some shapes, or when the time is over."""

    def __init__(self, op: str, library: CudaLibrary, times: Times) -> None:
        self.op, self.library, self.times = op, library, times
        self.tiles = library.tiles(op)
        self.experts = EXPERTS if op.startswith("grouped_") else 0
        self.shapes: Sequence[Shape] = EXPERT_SHAPES if self.experts else SHAPES
        self.rows = EXPERT_ROWS if self.experts else ROWS
        self.measured: dict[Shape, dict[int, dict[Native, float]]] = {}

    def measure(self, shape: Shape, budget: Budget) -> None:
        """Times of every candidate at every M; nothing is kept of a shape for which the time did not suffice."""
        found: dict[int, dict[Native, float]] = {}
        for M in self.rows:
            found[M] = self._times(self._product(M, shape), budget)
            best: dict[str, float] = defaultdict(lambda: math.inf)
            for candidate, ms in found[M].items():
                best[candidate.kernel] = min(best[candidate.kernel], ms)
            if M >= MANY_ROWS and best["dequantize_gemm"] * CLEARLY < best["tiled"]:
                break
        self.measured[shape] = found

    def solve(self, budget: Budget) -> CudaOp | None:
        """None: no shape was measured. Raises NoKernelError where what ran does not suffice."""
        if not self.measured:
            return None
        return self._solve_experts(budget) if self.experts else self._solve_weight(budget)

    def _product(self, M: int, shape: Shape) -> Product:
        return Product(self.op, M, shape, self.experts)

    def _times(self, product: Product, budget: Budget) -> dict[Native, float]:
        alike: dict[tuple[str, int, int], list[Native]] = {}  # candidates that are the same launch
        for candidate in self._candidates(product.M):
            choice = self.library.choice(product, candidate)
            if choice is not None:
                alike.setdefault(choice, []).append(candidate)
        times = self.times(product, [same[0] for same in alike.values()], budget)
        return {candidate: times[same[0]] for same in alike.values() if same[0] in times for candidate in same}

    def _candidates(self, M: int) -> Iterable[Native]:
        if M <= SMALL_ROWS and not self.op.endswith("dgrad"):
            yield Native(*SMALL)
        for tile in range(len(self.tiles)):
            for blocks in (1,) if self.experts else BLOCKS:
                yield Native("tiled", tile, blocks)
        if M >= LEAST_GEMM_ROWS:
            yield Native(*GEMM)

    def _solve_weight(self, budget: Budget) -> CudaOp:
        """Tiles are compared by predicted times that are put right by the mean of what each takes where it is near."""
        blocks = [self._best_blocks(tile) for tile in range(len(self.tiles))]
        errors = [self._error(tile, blocks[tile]) for tile in range(len(self.tiles))]
        least = min(errors)
        costs = (  # of a tile that nowhere ran: the most
            min(round(1000 * math.exp(error - least)), MOST_COST) if error < math.inf else MOST_COST for error in errors
        )
        own = CudaOp(0, ANY_ROWS, tuple(map(Tile, self.tiles, [ANY_ROWS] * len(blocks), costs, blocks)))

        def tiled(product: Product) -> Native:
            tile = self.library.tile_of(product, own)
            return Native("tiled", tile, blocks[tile])

        limits = self._limits({SMALL: self._as(SMALL), TILED: tiled, GEMM: self._as(GEMM)}, budget)
        return CudaOp(limits[SMALL], limits[TILED], own.tiles)

    def _solve_experts(self, budget: Budget) -> CudaOp:
        kernels = [("tiled", tile) for tile in range(len(self.tiles))]
        limits = self._limits({kernel: self._as(kernel) for kernel in (SMALL, *kernels, GEMM)}, budget)
        up_to = [*(limits[kernel] for kernel in kernels[:-1]), ANY_ROWS]
        return CudaOp(limits[SMALL], limits[kernels[-1]], tuple(map(Tile, self.tiles, up_to)))

    @staticmethod
    def _as(kernel: Kernel) -> Callable[[Product], Native]:
        return lambda product: Native(*kernel)

    def _near(self, tile: int) -> list[tuple[Product, dict[Native, float]]]:
        """The products where a tile is about as fast as the best one, with all times; all of the tile's if none is."""
        every, near = [], []
        for shape, found in self.measured.items():
            for M, times in found.items():
                tiled = {c: ms for c, ms in times.items() if c.kernel == "tiled"}
                own = min((ms for c, ms in tiled.items() if c.tile == tile), default=math.inf)
                if own < math.inf:
                    every.append((self._product(M, shape), times))
                    near += every[-1:] if own <= NEAR * min(tiled.values()) else []
        return near or every

    def _best_blocks(self, tile: int) -> int:
        """The number with the least time; the least number of those that are alike."""
        near = self._near(tile)

        def cost(blocks: int) -> float:
            return mean_logarithm([times.get(Native("tiled", tile, blocks), math.inf) for _, times in near])

        return min(BLOCKS, key=lambda blocks: (cost(blocks), blocks))

    def _error(self, tile: int, blocks: int) -> float:
        """The logarithm of a tile's milliseconds over its predicted cycles, a mean; infinity without any."""
        candidate = Native("tiled", tile, blocks)
        return mean_logarithm(
            [
                times[candidate] / self.library.cycles(product, tile, blocks)
                for product, times in self._near(tile)
                if candidate in times
            ]
        )

    def _limits(self, kernels: Mapping[Kernel, Callable[[Product], Native]], budget: Budget) -> dict[Kernel, int]:
        """Each kernel's most rows; a kernel that is nowhere the fastest has those of the one before it.

        Where not all of `rows` were measured, what runs the last of them has no more, but for the last kernel.
        """
        every_m = sorted(set.intersection(*(set(found) for found in self.measured.values())))
        costs = {kernel: self._costs(candidate_of, every_m) for kernel, candidate_of in kernels.items()}
        ranges = best_ranges(costs, list(kernels))
        every_m = list(ranges)
        limits, last = {}, 0
        for kernel in kernels:
            own = [M for M in every_m if ranges[M] == kernel]
            if own:
                after = next((M for M in every_m if own[-1] < M), None)
                if after is None:
                    has_any = every_m[-1] == self.rows[-1] or kernel == list(kernels)[-1]
                    last = ANY_ROWS if has_any else own[-1]
                else:
                    stays = partial(self._is_faster, kernels[kernel], kernels[ranges[after]], budget)
                    last = limit_between(own[-1], after, stays)
            limits[kernel] = last
        return limits

    def _costs(self, candidate_of: Callable[[Product], Native], every_m: Iterable[int]) -> dict[int, float]:
        """M -> the mean over the shapes, where it runs all of them."""
        found = {}
        for M in every_m:
            values = [
                times[M].get(candidate_of(self._product(M, shape)), math.inf) for shape, times in self.measured.items()
            ]
            if max(values) < math.inf:
                found[M] = mean_logarithm(values)
        return found

    def _is_faster(
        self, first: Callable[[Product], Native], second: Callable[[Product], Native], budget: Budget, M: int
    ) -> bool:
        difference = 0.0
        for product in (self._product(M, shape) for shape in self.measured):
            one, other = first(product), second(product)
            times = self.times(product, (one, other), budget)
            difference += math.log(times.get(one, math.inf)) - math.log(times.get(other, math.inf))
        return difference <= 0


def tune_cuda(
    library: CudaLibrary, times: Times, ops: Sequence[str], shapes: int, budget: Budget, say: Callable[[str], None]
) -> dict[str, CudaOp]:
    """op -> its parameters, of the ops that there was time for: each with its first shape, then each with the next.

    An op whose kernels did not run is left out as well, and `say` is told.
    """
    searches = [OpSearch(op, library, times) for op in ops]
    measuring = budget.part(0.8)
    try:
        for number in range(shapes):
            for search in searches:
                if number < len(search.shapes):
                    search.measure(search.shapes[number], measuring)
    except OutOfTimeError:
        pass
    found: dict[str, CudaOp] = {}
    for search in searches:
        try:
            own = search.solve(budget)
        except NoKernelError as error:
            say(f"{search.op} stays as predicted: {error}")
        else:
            if own is not None:
                found[search.op] = own
    return found
