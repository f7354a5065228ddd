"""What Triton's products run by on the present card: a configuration for each range of rows, and the rows from which on
dequantize + GEMM is faster. Also who is faster where CUDA's kernels run as well."""

import math
from collections.abc import Callable, Mapping, Sequence

from ..backends.tuned_table import ANY_ROWS, PRODUCTS, Config, Rule
from .products import Native, Product, Shape, Times, Triton, mean_logarithm
from .search import Budget, NoKernelError, OutOfTimeError, best_config, best_ranges, limit_between

GEMM_ROWS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
MOST_M = 512  # that the last range is measured at
RULE_ROWS = (1, 4, 16, 64, 256, 1024)
# Of the compiled kernel's time, below which Triton takes an op: a choice between backends is made in Python.
CLEARLY = 0.95
Buckets = Mapping[int, Config]  # most rows -> configuration, ascending; the last takes any


def config_of(buckets: Buckets, M: int) -> Config:
    return next((config for most, config in buckets.items() if most >= M), list(buckets.values())[-1])


def tune_configs(
    start: Mapping[str, Buckets], times: Times, shapes: Sequence[Shape], budget: Budget
) -> dict[str, dict[int, Config]]:
    """op -> most rows -> the best configuration, of the ranges that there was time for; each has its share of it."""
    found: dict[str, dict[int, Config]] = {op: {} for op in start}
    ranges = [(op, most) for op, buckets in start.items() for most in buckets]
    for number, (op, most) in enumerate(ranges):
        own, M = budget.part(1 / (len(ranges) - number)), min(most, MOST_M)

        def costs(configs: Sequence[Config], op=op, M=M, own=own) -> dict[Config, float]:
            candidates = [Triton("fused", config) for config in configs]
            runs = [times(Product(op, M, shape), candidates, own) for shape in shapes]
            return {c.config: mean_logarithm([ms[c] for ms in runs]) for c in candidates if all(c in ms for ms in runs)}

        best = best_config(start[op][most], costs)
        if best is not None:
            found[op][most] = best
    return {op: own for op, own in found.items() if own}


def dequantize_gemm_from(
    buckets: Mapping[str, Buckets],
    times: Times,
    shapes: Sequence[Shape],
    budget: Budget,
    say: Callable[[str], None],
) -> dict[str, int]:
    """op -> the least M from which on dequantize + GEMM is faster; ANY_ROWS: it never is.

    An op whose kernels did not run is left out, as one is that there was no time for, and `say` is told.
    """
    found = {}
    for number, op in enumerate(buckets):
        own = budget.part(1 / (len(buckets) - number))

        def costs(M: int, op=op, own=own) -> dict[str, float]:
            sides = [Triton(path, config_of(buckets[op], M)) for path in ("fused", "dequantize_gemm")]
            runs = [times(Product(op, M, shape), sides, own) for shape in shapes]
            return {c.path: mean_logarithm([ms[c] for ms in runs]) for c in sides if all(c in ms for ms in runs)}

        try:
            measured = {M: costs(M) for M in GEMM_ROWS}
        except OutOfTimeError:
            continue
        sides = {
            path: {M: ms[path] for M, ms in measured.items() if path in ms} for path in ("fused", "dequantize_gemm")
        }
        try:
            ranges = best_ranges(sides, list(sides))
        except NoKernelError as error:
            say(f"{op} in Triton stays as predicted: {error}")
            continue
        fused = [M for M, path in ranges.items() if path == "fused"]
        after = next((M for M, path in ranges.items() if path == "dequantize_gemm"), None)
        if after is None:
            found[op] = ANY_ROWS
            continue

        def stays(M: int, costs=costs) -> bool:
            both = costs(M)
            return both.get("fused", math.inf) <= both.get("dequantize_gemm", math.inf)

        found[op] = limit_between(fused[-1] if fused else 0, after, stays) + 1
    return found


def tune_backends(
    buckets: Mapping[str, Buckets], least: Mapping[str, int], times: Times, shapes: Sequence[Shape], budget: Budget
) -> tuple[Rule, ...]:
    """Who takes each product in bf16, up to how many rows; no rule where the compiled kernels do to the end."""
    rules: list[Rule] = []
    for number, op in enumerate(PRODUCTS):
        own, ratios = budget.part(1 / (len(PRODUCTS) - number)), list[tuple[int, float]]()
        try:
            for M in RULE_ROWS:
                triton = Triton("fused" if least[op] > M else "dequantize_gemm", config_of(buckets[op], M))
                runs = [times(Product(op, M, shape), (Native(), triton), own) for shape in shapes]
                every = [ms[triton] / ms[Native()] if {triton, Native()} <= set(ms) else math.inf for ms in runs]
                ratios.append((M, math.exp(mean_logarithm(every))))
        except OutOfTimeError:
            continue
        winners = ["triton" if ratio < CLEARLY else "native" for _, ratio in ratios]
        for (M, ratio), winner, after in zip(ratios, winners, [*winners[1:], "native"]):
            if winner != after:
                rules.append(Rule(op, "bfloat16", M, winner, f"measured: triton takes {ratio:.2f} of native's time"))
    return tuple(sorted(rules, key=lambda rule: rule.rows))
