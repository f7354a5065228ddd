"""Times products on a GPU, fairly: random data, weights that no cache holds, candidates in turns, medians.

A sample is a graph of as many calls as take about SAMPLE_MS, so that launches are not in it; without a graph where none
can be captured. Before a candidate is timed, what it computes is compared with a product in float64; of experts it has
to be finite.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor

from ..functional import dequantize, quantize, quantize_experts
from ..quantized_weight import QuantizedExperts, QuantizedWeight
from .products import Candidate, Product, Shape
from .search import Budget

SAMPLE_MS, ROUNDS = 1.0, 5
CHECKED_ROWS, CHECKED_COLUMNS = 4, 512
UNKNOWN_CACHE = 128 << 20  # bytes, of a device that does not tell


class Clock:
    """A GPU's, which becomes the current one: times of a function there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.module.set_device(device)  # graphs are captured, and events recorded, on the current one
        properties = self.module.get_device_properties(device)
        self.cache_bytes: int = getattr(properties, "L2_cache_size", 0) or UNKNOWN_CACHE

    def sampler(self, run: Callable[[], object], copies: int) -> Callable[[], float]:
        """A function that times `run` in milliseconds a call, over all `copies` at least once where calls are short."""
        run()  # what it compiles or sets up
        self.module.synchronize()
        begin = time.perf_counter()
        run()
        self.module.synchronize()
        took = (time.perf_counter() - begin) * 1e3
        calls = max(1, round(SAMPLE_MS / max(took, 1e-3)), copies if took < 0.2 else 1)
        repeated = self._captured(run, calls) if self.device.type == "cuda" else None
        repeated = repeated or (lambda: [run() for _ in range(calls)])
        first, last = (self.module.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            first.record()
            repeated()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / calls

        sample()
        return sample

    @staticmethod
    def _captured(run: Callable[[], object], calls: int) -> Callable[[], object] | None:
        """None where a graph cannot capture it, as what waits for the device or sets itself up late."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    run()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own the current one
            return None
        return graph.replay


@dataclass
class Timer:
    """`Times` on a device.

    `product` gives the function of an op for a candidate, and what it must be run in, anew at each call. A candidate
    that raises one of `refusals` or a RuntimeError, as out of memory is one, has no time; of the latter `say` is told.
    """

    clock: Clock
    product: Callable[[str, Candidate], tuple[Callable[..., Tensor], AbstractContextManager]]
    say: Callable[[str], None] = print
    refusals: tuple[type[Exception], ...] = ()  # what a candidate raises that cannot run here
    forget_graphs: Callable[[], None] = lambda: None  # told after each measurement, whose graphs are gone
    weights: dict[tuple[Shape, int], "Weights"] = field(default_factory=dict)

    def __call__(self, product: Product, candidates: Sequence[Candidate], budget: Budget) -> Mapping[Candidate, float]:
        try:
            return self._times(product, candidates, budget)
        finally:
            self.forget_graphs()

    def _times(self, product: Product, candidates: Sequence[Candidate], budget: Budget) -> dict[Candidate, float]:
        try:
            samplers = self._samplers(product, candidates, budget)
        except torch.OutOfMemoryError as error:
            self.say(f"{product} is not measured: {_first_line(error)}")
            return {}
        samples: dict[Candidate, list[float]] = {candidate: [] for candidate in samplers}
        for _ in range(ROUNDS):
            budget.check()
            for candidate in list(samples):
                try:
                    with self.product(product.op, candidate)[1]:  # also what is no graph runs by the candidate
                        samples[candidate].append(samplers[candidate]())
                except RuntimeError as error:
                    self._say_why_not(product, candidate, error)
                    del samples[candidate]
        return {candidate: statistics.median(values) for candidate, values in samples.items()}

    def _say_why_not(self, product: Product, candidate: Candidate, error: Exception) -> None:
        self.say(f"{product} by {candidate} is not used: {_first_line(error)}")

    def _samplers(
        self, product: Product, candidates: Sequence[Candidate], budget: Budget
    ) -> dict[Candidate, Callable[[], float]]:
        """Of the candidates that can run, and are right."""
        weights = self._weights(product)
        x, *offsets = weights.rows(product)
        samplers: dict[Candidate, Callable[[], float]] = {}
        for candidate in candidates:
            budget.check()
            function, running = self.product(product.op, candidate)
            run = weights.call(function, product, x, *offsets)
            try:
                with running:
                    if not weights.is_right(product.op, run(), x):
                        self.say(f"{product} by {candidate} is WRONG against float64, and is not used")
                        continue
                    samplers[candidate] = self.clock.sampler(run, len(weights.copies))
            except self.refusals:
                continue
            except RuntimeError as error:
                self._say_why_not(product, candidate, error)
        return samplers

    def _weights(self, product: Product) -> "Weights":
        key = product.shape, product.experts
        if key not in self.weights:
            self.weights[key] = Weights(product.shape, product.experts, self.clock)
        return self.weights[key]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Weights:
    """Equal random weights, as many as are twice what the cache holds; or experts."""

    def __init__(self, shape: Shape, experts: int, clock: Clock) -> None:
        self.shape, self.experts = shape, experts
        sizes = (experts, *shape) if experts else shape
        dense = torch.randn(*sizes, device=clock.device, dtype=torch.bfloat16) * 0.02
        first: QuantizedWeight | QuantizedExperts = quantize_experts(dense) if experts else quantize(dense)
        number = max(2, -(-2 * clock.cache_bytes // first.packed.nbytes) + 1)
        self.copies = [first, *(replace(first, packed=first.packed.clone()) for _ in range(number - 1))]
        self.device = clock.device
        self._turn = count()

    def columns(self, op: str) -> int:
        return self.shape[0] if op.endswith("dgrad") else self.shape[1]

    def rows(self, product: Product) -> tuple[Tensor, ...]:
        """x, and of experts the offsets that a router of equal chances gives: the same for all candidates."""
        x = torch.randn(product.rows, self.columns(product.op), device=self.device).bfloat16()
        if not self.experts:
            return (x,)
        owners = torch.randint(self.experts, (product.rows,), device=self.device)
        return x, torch.bincount(owners, minlength=self.experts).cumsum(0).int()

    def call(
        self, function: Callable[..., Tensor], product: Product, x: Tensor, *offsets: Tensor
    ) -> Callable[[], Tensor]:
        """The product with the next of the weights at each call."""
        bias = () if product.op.endswith("dgrad") else (None,)

        def run() -> Tensor:
            weight = self.copies[next(self._turn) % len(self.copies)]
            return function(x, *offsets, *weight.op_args(), *bias)

        return run

    def is_right(self, op: str, y: Tensor, x: Tensor) -> bool:
        """The first rows and columns against a product in float64, by the bound of docs/design.md, section 7.

        Experts have only to be finite: make gpu holds them to float64, and no configuration of theirs is tuned.
        """
        first = self.copies[0]
        if isinstance(first, QuantizedExperts):
            return bool(y.isfinite().all())
        x, y = x[:CHECKED_ROWS], y[:CHECKED_ROWS, :CHECKED_COLUMNS].double()
        part = (0, y.shape[1])
        if op.endswith("dgrad"):
            matrix = dequantize(first, torch.float32, cols=part)
        else:
            matrix = dequantize(first, torch.float32, rows=part).T
        exact = x.double() @ matrix.double()
        dense = (x @ matrix.to(x.dtype)).double()
        allowed = 2 * (dense - exact).norm() + 1.5 * torch.finfo(x.dtype).eps / exact.shape[1] ** 0.5 * exact.norm()
        return bool((y - exact).norm() <= allowed)
