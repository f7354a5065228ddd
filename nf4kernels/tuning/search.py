"""Finds parameters by times: pure arithmetic, whose times and clock are given.

Kernels are ordered by the M that they are for. What is looked for is the order's best cut into ranges of M, by the sum
of the logarithms of the times: one slow sample moves no limit far, and no limit crosses another.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..backends.tuned_table import Config

Kernel = TypeVar("Kernel", bound=Hashable)
LEAST_GAP = 8  # between the rows of two ranges, from which on their limit is not looked for any closer
# What each field of a configuration may be, in the order in which they are tried.
CHOICES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "depth": (512, 1024, 2048, 4096, 8192),
    "warps": (2, 4, 8),
    "stages": (2, 3, 4, 5),
}
ROUNDS = 2  # over all fields


class OutOfTimeError(Exception):
    """The time for a measurement is over."""


class NoKernelError(ValueError):
    """No kernel could be measured that runs some M."""


@dataclass
class Budget:
    """Seconds of a clock, from now on."""

    seconds: float
    clock: Callable[[], float]
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def left(self) -> float:
        return self.began + self.seconds - self.clock()

    def check(self) -> None:
        if self.left() <= 0:
            raise OutOfTimeError

    def part(self, share: float) -> "Budget":
        """This share of what is left."""
        return Budget(max(self.left(), 0) * share, self.clock)


def best_ranges(costs: Mapping[Kernel, Mapping[int, float]], order: Sequence[Kernel]) -> dict[int, Kernel]:
    """M -> the kernel that runs there; a kernel of `order` never runs after one that follows it in the order.

    A cost is the logarithm of a time. M that a kernel has no cost for are not its own; M without any are left out.

    Raises NoKernelError where nothing is left, or no order of the kernels runs it.
    """
    all_m = sorted({M for kernel in order for M in costs[kernel]})
    sums = [0.0] * len(order)  # of the ranges so far, if the last of them is this kernel's
    before: list[list[int]] = []
    for M in all_m:
        best, from_kernel, new = 0, [], []
        for i, kernel in enumerate(order):
            if sums[i] < sums[best]:
                best = i
            from_kernel.append(best)
            new.append(sums[best] + costs[kernel].get(M, math.inf))
        before.append(from_kernel)
        sums = new
    last = min(range(len(order)), key=lambda i: sums[i])
    if not all_m or sums[last] == math.inf:
        raise NoKernelError("every M must have a kernel that runs it, in the order of kernels")
    ranges = {}
    for M, from_kernel in zip(reversed(all_m), reversed(before)):
        ranges[M] = order[last]
        last = from_kernel[last]
    return dict(sorted(ranges.items()))


def limit_between(low: int, high: int, stays: Callable[[int], bool]) -> int:
    """The largest M of a kernel that runs at `low` and no more at `high`, where `stays` compares it with the next."""
    while high - low > max(LEAST_GAP, low // 8):
        middle = (low + high) // 2
        middle -= middle % LEAST_GAP if middle - middle % LEAST_GAP > low else 0
        try:
            low, high = (middle, high) if stays(middle) else (low, middle)
        except OutOfTimeError:
            break
    return low


def best_config(start: Config, costs: Callable[[Sequence[Config]], Mapping[Config, float]]) -> Config | None:
    """Coordinate descent from `start`; what was the best when the time was over. None: no time for the first, either.

    `costs` gives those of the configurations that can run.
    """
    known: dict[Config, float] = {}

    def measure(configs: Sequence[Config]) -> None:
        new = [config for config in dict.fromkeys(configs) if config not in known]
        if new:
            known.update(dict.fromkeys(new, math.inf) | dict(costs(new)))

    try:
        measure([start])
        best = start
        for _ in range(ROUNDS):
            before = best
            for name, values in CHOICES.items():
                near = [best, *(Config(**(vars(best) | {name: value})) for value in values)]
                measure(near)
                best = min(near, key=lambda config: known[config])
            if best == before:
                break
    except OutOfTimeError:
        pass
    found = min(known, key=lambda config: known[config], default=start)
    return found if known.get(found, math.inf) < math.inf else None
