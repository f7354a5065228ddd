"""The arithmetic of tuning, with times that are formulas and a clock that is a counter."""

import math

import pytest

from nf4kernels.backends.tuned_table import ANY_ROWS, MOST_COST, Config, CudaOp, Rule, Tile
from nf4kernels.tuning import search
from nf4kernels.tuning.cuda import MANY_ROWS, ROWS, tune_cuda
from nf4kernels.tuning.products import SHAPES, Native, Triton
from nf4kernels.tuning.search import Budget, NoKernelError, OutOfTimeError, best_config, best_ranges, limit_between
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
    with pytest.raises(NoKernelError, match="every M must have a kernel"):
        best_ranges({"a": {}, "b": {}}, "ab")


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


# Of one weight: up to how many rows small is the fastest, and what is fused; what each tile takes, in predicted times,
# and the blocks with which it does.
SMALL, FUSED = {"linear": 12, "linear_dgrad": 0}, {"linear": 300, "linear_dgrad": 200}
ERRORS, BLOCKS = (1.5, 1.0, 2.5), (2, 4, 1)
# Of experts: up to how many rows each kernel is the fastest.
GEMM = ("dequantize_gemm", 0)
EXPERTS = {("small", 0): 20, ("tiled", 0): 20, ("tiled", 1): 64, ("tiled", 2): 700, GEMM: ANY_ROWS}


class Library:
    """A library whose tiles are each the best predicted one at some M of its own, and run at those near it."""

    rows = (32, 64, 128)

    def tiles(self, op: str) -> list[str]:
        return TILES

    def choice(self, product, candidate: Native):
        if candidate.kernel == "small" and (
            product.op == "linear_dgrad" or (64 if product.experts else 16) < product.M
        ):
            return None
        return candidate.kernel, candidate.tile, candidate.blocks

    def cycles(self, product, tile: int, blocks: int) -> float:
        return 1000 * (1 + abs(math.log2(product.M / self.rows[tile]))) * product.shape[0]

    def tile_of(self, product, own: CudaOp) -> int:
        costs = [tile.cost * self.cycles(product, i, tile.blocks) for i, tile in enumerate(own.tiles)]
        return costs.index(min(costs))


LIBRARY = Library()


def milliseconds(product, candidate: Native) -> float:
    if product.experts:
        best = next(name for name, most in EXPERTS.items() if most >= product.M)
        return 1 + 0.3 * abs(list(EXPERTS).index(best) - list(EXPERTS).index((candidate.kernel, candidate.tile)))
    if candidate.kernel == "tiled":
        tile = candidate.tile
        worse = 1 + 0.1 * abs(candidate.blocks - BLOCKS[tile])
        return ERRORS[tile] * worse * LIBRARY.cycles(product, tile, 1)
    tiled = min(error * LIBRARY.cycles(product, tile, 1) for tile, error in enumerate(ERRORS))
    if candidate.kernel == "small":
        return tiled * (0.5 if SMALL[product.op] >= product.M else 2)
    return tiled * (2 if FUSED[product.op] >= product.M else 0.9)


def tuned(
    seconds: float, ops=("linear", "linear_dgrad", "grouped_linear"), shapes: int = 3, formula=milliseconds, say=print
):
    clock = Clock()
    return tune_cuda(LIBRARY, times_by(formula, clock), ops, shapes, Budget(seconds, clock), say), clock.now


def assert_close(limit: int, known: int) -> None:
    assert limit == known or 0 <= known - limit <= max(search.LEAST_GAP, limit // 8), (limit, known)


def test_known_limits_and_the_errors_of_predictions_are_found():
    found, _ = tuned(math.inf)
    for op in SMALL:
        own = found[op]
        assert_close(own.small, SMALL[op])
        assert_close(own.tiled, FUSED[op])
        assert [tile.tile for tile in own.tiles] == TILES
        assert [tile.cost for tile in own.tiles] == [1500, 1000, 2500]
        assert tuple(tile.blocks for tile in own.tiles) == BLOCKS


def test_known_tiles_of_experts_are_found():
    own = tuned(math.inf)[0]["grouped_linear"]
    assert_close(own.small, EXPERTS["small", 0])
    assert_close(own.tiled, EXPERTS["tiled", 2])
    assert own.tiles[0].up_to == own.small, "a tile that is nowhere the fastest"
    assert_close(own.tiles[1].up_to, EXPERTS["tiled", 1])
    assert own.tiles[2].up_to == ANY_ROWS


def test_what_there_is_no_time_for_is_left_out():
    _, first = tuned(math.inf, ["linear"], 1)
    found, took = tuned(2.5 * first, shapes=3)
    assert "linear" in found
    assert len(found) < 3
    assert took <= 2.5 * first + 1
    assert tuned(0)[0] == {}
    assert tuned(5)[0] == {}, "a shape that was begun does not count"


def test_a_second_shape_counts_as_much_as_the_first():
    """Where dequantize + GEMM is 1.5 times as slow on one shape as fast on the other, it is not the faster."""

    def formula(product, candidate):
        if candidate.kernel != "dequantize_gemm":
            return milliseconds(product, candidate)
        tiled = min(error * LIBRARY.cycles(product, tile, 1) for tile, error in enumerate(ERRORS))
        return tiled * (9 if product.M < 64 else 0.9 if product.shape == SHAPES[0] else 1.5)

    one, _ = tuned(math.inf, ["linear"], 1, formula)
    two, _ = tuned(math.inf, ["linear"], 2, formula)
    assert one["linear"].tiled < 64
    assert two["linear"].tiled == ANY_ROWS


def test_many_rows_are_not_measured_where_the_winner_is_clear():
    seen = []

    def formula(product, candidate):
        seen.append(product.M)
        return milliseconds(product, candidate) * (0.3 if candidate.kernel == "dequantize_gemm" else 1)

    tuned(math.inf, ["linear"], 1, formula)
    assert max(seen) == 256 < ROWS[-1]


def test_tiled_has_no_more_rows_than_were_measured_of_every_shape():
    """dequantize + GEMM is clearly faster on one of three shapes, where no more is measured; the mean says tiled."""

    def formula(product, candidate):
        if candidate.kernel == "dequantize_gemm":
            return milliseconds(product, Native("tiled", 1, 4)) * (0.5 if product.shape == SHAPES[2] else 20)
        return milliseconds(product, candidate)

    own = tuned(math.inf, ["linear"], 3, formula)[0]["linear"]
    assert own.tiled == MANY_ROWS
    own = tuned(math.inf, ["linear"], 2, formula)[0]["linear"]
    assert own.tiled == ANY_ROWS, "where all shapes are measured to the last"


def test_an_op_whose_kernels_do_not_run_stays_predicted():
    def formula(product, candidate):
        if product.op == "linear_dgrad" or (product.op == "grouped_linear" and candidate.kernel == "tiled"):
            return None
        return milliseconds(product, candidate)

    said = []
    found, _ = tuned(math.inf, formula=formula, say=said.append)
    assert set(found) == {"linear", "grouped_linear"}
    assert found["grouped_linear"].tiled == found["grouped_linear"].small < ANY_ROWS, "small, then dequantize + GEMM"
    assert said == ["linear_dgrad stays as predicted: every M must have a kernel that runs it, in the order of kernels"]


def test_rows_and_tiles_that_nothing_ran_are_left_out():
    """A tile that was wrong everywhere is not taken; an M without memory has no limit of its own."""

    def formula(product, candidate):
        is_wrong = candidate.kernel == "tiled" and candidate.tile == 1
        return None if is_wrong or product.M in (1, 2048) else milliseconds(product, candidate)

    own = tuned(math.inf, ["linear"], formula=formula)[0]["linear"]
    assert [tile.cost for tile in own.tiles] == [1000, MOST_COST, round(1000 * ERRORS[2] / ERRORS[0])]
    assert_close(own.small, SMALL["linear"])


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
    found = dequantize_gemm_from(best, times, SHAPES[:2], Budget(1e9, clock), print)
    assert 230 - 230 // 8 <= found["linear"] - 1 <= 230
    assert found["linear_dgrad"] == ANY_ROWS, "it never is"
    clock.now = 0.0
    assert dequantize_gemm_from(best, times, SHAPES[:2], Budget(40, clock), print) == {}, "both were begun"
    said = []
    nothing_runs = times_by(lambda product, candidate: None, clock)
    assert dequantize_gemm_from(best, nothing_runs, SHAPES[:2], Budget(1e9, clock), said.append) == {}
    assert said[0].startswith("linear in Triton stays as predicted: every M must have")


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
    one_side = times_by(lambda product, c: None if isinstance(c, Native) else 1.0, clock)
    assert tune_backends(buckets, least, one_side, SHAPES[:2], Budget(1e9, clock)) == ()


def test_a_candidate_s_parameters_leave_the_library_one_kernel():
    assert Native("small").only(TILES).small == ANY_ROWS
    own = Native("tiled", 1, 3).only(TILES)
    tiles = (Tile(TILES[0], 0, MOST_COST, 3), Tile(TILES[1], ANY_ROWS, 1, 3), Tile(TILES[2], ANY_ROWS, MOST_COST, 3))
    assert own == CudaOp(0, ANY_ROWS, tiles)
    own = Native("dequantize_gemm").only(TILES)
    assert (own.small, own.tiled) == (0, 0)
    assert Triton("fused", START) == Triton("fused", START), "candidates are keys"
