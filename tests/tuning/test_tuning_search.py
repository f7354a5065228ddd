"""The arithmetic of tuning, with times that are formulas and a clock that is a counter."""

import math

import pytest

from nf4kernels.backends.tuned_table import ANY_ROWS, Config, CudaOp, Rule, Tile
from nf4kernels.tuning import search
from nf4kernels.tuning.cuda import ROWS, CudaLibrary, tune_cuda
from nf4kernels.tuning.products import SHAPES, Native, Triton
from nf4kernels.tuning.search import Budget, OutOfTimeError, best_config, best_ranges, limit_between
from nf4kernels.tuning.triton import dequantize_gemm_from, tune_backends, tune_configs

TILES = ["32x64x128", "64x64x128", "128x128x64"]


class Clock:
    """A second goes by for each candidate that is timed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def times_by(formula, clock: Clock):
    def times(product, candidates, budget):
        found = {}
        for candidate in candidates:
            budget.check()
            clock.now += 1
            ms = formula(product, candidate)
            if ms is not None:
                found[candidate] = ms
        return found

    return times


def test_ranges_are_those_of_the_least_times_in_order():
    costs = {"a": {1: 0, 2: 0, 4: 9, 8: 9}, "b": {2: 5, 4: 1, 8: 2}, "c": {2: 5, 4: 8, 8: 1}}
    assert best_ranges(costs, "abc") == {1: "a", 2: "a", 4: "b", 8: "c"}
    assert best_ranges(costs, "ab") == {1: "a", 2: "a", 4: "b", 8: "b"}


def test_one_slow_sample_moves_no_limit_far():
    rows = (1, 2, 4, 8, 16, 32)
    costs = {"a": {M: M / 8 for M in rows}, "b": dict.fromkeys(rows, 1.0)}
    assert best_ranges(costs, "ab") == {1: "a", 2: "a", 4: "a", 8: "a", 16: "b", 32: "b"}
    costs["a"][2] += 1.2  # which would give 2 to b alone
    assert best_ranges(costs, "ab") == {1: "a", 2: "a", 4: "a", 8: "a", 16: "b", 32: "b"}


def test_a_row_without_a_kernel_is_an_error():
    with pytest.raises(ValueError, match="every M must have a kernel"):
        best_ranges({"a": {2: 0.0}, "b": {1: 0.0}}, "ab")


@pytest.mark.parametrize("crossing", [256, 264, 300, 352, 383])
def test_a_limit_is_found_between_two_rows(crossing):
    asked = []

    def stays(M: int) -> bool:
        asked.append(M)
        return crossing >= M

    found = limit_between(256, 384, stays)
    assert 0 <= crossing - found <= found // 8
    assert len(asked) <= 3
    assert all(M % 8 == 0 for M in asked)
    assert limit_between(16, 24, stays) == 16
    assert limit_between(0, 32, lambda M: M <= 8) == 8


def test_a_limit_is_the_last_that_was_found_when_the_time_is_over():
    def stays(M: int) -> bool:
        raise OutOfTimeError

    assert limit_between(256, 384, stays) == 256


def test_a_budget_is_a_clock_s():
    clock = Clock()
    budget = Budget(10, clock)
    clock.now = 4
    part = budget.part(0.5)
    clock.now = 6.5
    part.check()
    clock.now = 7
    budget.check()
    with pytest.raises(OutOfTimeError):
        part.check()
    assert budget.left() == 3


START, WANTED = Config(16, 64, 4, 5, 1024), Config(64, 128, 8, 2, 4096)


def distance(config: Config) -> float:
    return 1 + sum(abs(getattr(config, name) / getattr(WANTED, name) - 1) for name in vars(WANTED))


def test_the_quickest_configuration_is_found():
    seen = []

    def costs(configs):
        seen.extend(configs)
        return {config: distance(config) for config in configs if config.stages != 4}

    assert best_config(START, costs) == WANTED
    assert len(seen) == len(set(seen)), "none is measured twice"
    assert best_config(START, lambda configs: {}) is None


def test_the_best_so_far_is_kept_when_the_time_is_over():
    calls = []

    def costs(configs):
        calls.append(configs)
        if len(calls) == 3:
            raise OutOfTimeError
        return {config: distance(config) for config in configs}

    assert best_config(START, costs) == Config(64, 64, 4, 5, 1024)

    def no_time(configs):
        raise OutOfTimeError

    assert best_config(START, no_time) is None


# Where each kernel is the fastest: up to these rows.
GEMM = ("dequantize_gemm", 0)
KNOWN = {
    "linear": {("small", 0): 12, ("tiled", 0): 40, ("tiled", 1): 40, ("tiled", 2): 300, GEMM: ANY_ROWS},
    "linear_dgrad": {("tiled", 0): 0, ("tiled", 1): 200, ("tiled", 2): 200, GEMM: ANY_ROWS},
    "grouped_linear": {("small", 0): 20, ("tiled", 0): 20, ("tiled", 1): 64, ("tiled", 2): ANY_ROWS},
}  # fmt: skip
BLOCKS = {("small", 0): 3, ("tiled", 0): 1, ("tiled", 1): 2, ("tiled", 2): 4, ("dequantize_gemm", 0): 1}


def milliseconds(product, candidate: Native) -> float:
    """1 for the kernel that is known to be the fastest, with the blocks that are; more with the distance to it."""
    known, kernel = KNOWN[product.op], (candidate.kernel, candidate.tile)
    best = next(name for name, most in known.items() if most >= product.M)
    away = abs(list(BLOCKS).index(best) - list(BLOCKS).index(kernel))
    return (1 + 0.3 * away) * (1 + 0.1 * abs(candidate.blocks - BLOCKS[kernel])) * product.shape[0] / 4096


def choice(product, candidate: Native):
    if (candidate.kernel, candidate.tile) not in KNOWN[product.op] or (candidate.kernel == "small" and product.M > 32):
        return None
    return candidate.kernel, candidate.tile, candidate.blocks


LIBRARY = CudaLibrary(choice, lambda op: TILES)


def tuned(seconds: float, ops=tuple(KNOWN), shapes: int = 3, formula=milliseconds):
    clock = Clock()
    return tune_cuda(LIBRARY, times_by(formula, clock), ops, shapes, Budget(seconds, clock)), clock.now


def assert_close(limit: int, known: int) -> None:
    assert limit == known or 0 <= known - limit <= max(search.LEAST_GAP, limit // 8), (limit, known)


def test_known_limits_tiles_and_blocks_are_found():
    found, _ = tuned(math.inf)
    for op, known in KNOWN.items():
        own = found[op]
        assert_close(own.small, known.get(("small", 0), 0))
        assert own.small_blocks == (BLOCKS["small", 0] if ("small", 0) in known else 1)
        assert_close(own.tiled, known["tiled", 2])
        assert [tile.tile for tile in own.tiles] == TILES
        for i, tile in enumerate(own.tiles[:-1]):
            assert_close(tile.up_to, known["tiled", i])
        assert own.tiles[-1].up_to == ANY_ROWS
        ranges = [known.get(("small", 0), 0), *(known["tiled", i] for i in range(3))]
        for i, tile in enumerate(own.tiles):
            if ranges[i + 1] > ranges[i]:  # a tile that never runs has no blocks to be found
                assert tile.blocks == BLOCKS["tiled", i], (op, tile)


def test_what_there_is_no_time_for_is_left_out():
    _, first = tuned(math.inf, ["linear"], 1)
    found, took = tuned(2.5 * first, shapes=3)
    assert "linear" in found
    assert len(found) < len(KNOWN)
    assert took <= 2.5 * first + 1
    assert tuned(0)[0] == {}
    assert tuned(5)[0] == {}, "a shape that was begun does not count"


def test_a_second_shape_counts_as_much_as_the_first():
    """Where dequantize + GEMM is 1.5 times as slow on one shape as fast on the other, it is not the faster."""

    def formula(product, candidate):
        is_gemm = candidate.kernel == "dequantize_gemm"
        if product.M < 64 or not is_gemm:
            return 1.0 + 0.01 * candidate.tile + 100 * is_gemm
        return 0.9 if product.shape == SHAPES[0] else 1.5

    one, _ = tuned(math.inf, ["linear"], 1, formula)
    two, _ = tuned(math.inf, ["linear"], 2, formula)
    assert one["linear"].tiled < 64
    assert two["linear"].tiled == ANY_ROWS


def test_many_rows_are_not_measured_where_the_winner_is_clear():
    seen = []

    def formula(product, candidate):
        seen.append(product.M)
        return milliseconds(product, candidate) * (0.1 if candidate.kernel == "dequantize_gemm" else 1)

    tuned(math.inf, ["linear"], 1, formula)
    assert max(seen) == 256 < ROWS[-1]


def triton_formula(product, candidate):
    if isinstance(candidate, Native):
        return 1.0
    if candidate.path == "dequantize_gemm":
        return 0.5 if product.op == "linear" and product.M > 230 else 90.0
    return distance(candidate.config) / (4 if product.M == 16 else 1)


BUCKETS = {op: {16: START, 65536: START} for op in ("linear", "linear_dgrad")}


def test_triton_s_configurations_are_found_while_there_is_time():
    clock = Clock()
    times = times_by(triton_formula, clock)
    found = tune_configs(BUCKETS, times, SHAPES[:1], Budget(1e9, clock))
    assert found == {op: {16: WANTED, 65536: WANTED} for op in BUCKETS}
    needed = clock.now
    clock.now = 0.0
    some = tune_configs(BUCKETS, times, SHAPES[:1], Budget(needed / 3, clock))
    assert clock.now <= needed / 3 + 1, "the candidate that was begun ends"
    assert all(distance(c) <= distance(START) for own in some.values() for c in own.values())
    assert tune_configs(BUCKETS, times, SHAPES[:1], Budget(0, clock)) == {}


def test_the_rows_of_dequantize_gemm_are_found():
    clock = Clock()
    times = times_by(triton_formula, clock)
    best = {op: {65536: WANTED} for op in BUCKETS}
    found = dequantize_gemm_from(best, times, SHAPES[:2], Budget(1e9, clock))
    assert 230 - 230 // 8 <= found["linear"] - 1 <= 230
    assert found["linear_dgrad"] == 2049, "past the last that was measured"
    clock.now = 0.0
    assert dequantize_gemm_from(best, times, SHAPES[:2], Budget(40, clock)) == {}, "both were begun"


def test_rules_name_the_faster_backend():
    clock = Clock()

    def formula(product, candidate):
        if isinstance(candidate, Native):
            return 1.0
        assert (candidate.path == "dequantize_gemm") == (product.M >= 200)
        return {1: 1.5, 4: 0.97, 16: 0.5, 64: 0.9, 256: 2.0}.get(product.M, 2.0) if product.op == "linear" else 1.0

    buckets, least = {op: {65536: WANTED} for op in BUCKETS}, dict.fromkeys(BUCKETS, 200)
    rules = tune_backends(buckets, least, times_by(formula, clock), SHAPES[:2], Budget(1e9, clock))
    assert rules == (
        Rule("linear", "bfloat16", 4, "native", "measured: triton takes 0.97 of native's time"),
        Rule("linear", "bfloat16", 64, "triton", "measured: triton takes 0.90 of native's time"),
    )
    assert tune_backends(buckets, least, times_by(formula, clock), SHAPES[:2], Budget(3, clock)) == ()


def test_a_candidate_s_parameters_leave_the_library_one_kernel():
    assert Native("small", 0, 2).only(TILES).small == ANY_ROWS
    own = Native("tiled", 1, 3).only(TILES)
    assert own == CudaOp(
        0, 3, ANY_ROWS, (Tile(TILES[0], 0, 3), Tile(TILES[1], ANY_ROWS, 3), Tile(TILES[2], ANY_ROWS, 3))
    )
    own = Native("dequantize_gemm").only(TILES)
    assert (own.small, own.tiled) == (0, 0)
    assert Triton("fused", START) == Triton("fused", START), "candidates are keys"
