"""The benchmarks' own logic: turns, floors, goals, tables, pictures and regressions; and one small run."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the benchmarks have no peer")

from benchmarks import checks, compare, compare_worker, harness, limits, shapes
from benchmarks.harness import BNB, BNB_DQ, DENSE, INT4, OURS, Row
from benchmarks.ops import bench_grouped_linear, bench_grouped_lora
from benchmarks.report import goals, plots
from benchmarks.report import tables as report

ABOUT = {"machine": "A CPU, 2 cores", "kernels": "native avx2", "torch": "2.13.0", "bitsandbytes": "0.50.2",
         "commit": "abc", "date": "2026-01-31", "command": "python -m benchmarks"}  # fmt: skip


class Clock:
    """Time that passes only where a side says so."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def side(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def rows() -> list[Row]:
    """What a run of two threads and of one finds, made up."""
    found = [
        Row("quantize", "4096x4096", None, 2, "out", {OURS: 5, BNB: 300, BNB_DQ: 320}, {BNB: (59, 60, 61),
            BNB_DQ: (60, 64, 66)}, 2, (0.38, 0.4, 0.41)),
        Row("qlora step", "a model", None, 2, "", {OURS: 100, BNB: 180, DENSE: 95}, {BNB: (1.7, 1.8, 2.6),
            DENSE: (0.9, 0.95, 1.0)}, tokens=512, peak_mib={OURS: 1000, BNB: 1100, DENSE: 1200},
            loss={OURS: 3.1, BNB: 3.2}, others=0.25),
    ]  # fmt: skip
    for shape in ("4096x4096", "11008x4096"):
        for M in (1, 16, 64):
            for threads, cache, dense in ((2, "out", 3.0), (1, "out", 9.0), (2, "in", 9.0)):
                ms = {OURS: 1.0, BNB: 1.5, BNB_DQ: 2.0, DENSE: dense}
                ratios = {side: (value - 0.25, value, value + 0.25) for side, value in ms.items() if side != OURS}
                found.append(Row("linear", shape, M, threads, cache, ms, ratios, 0.5, (0.45, 0.5, 0.55)))
    for M, int4 in ((1, (0.8, 0.9, 0.95)), (4, (1.0, 1.2, 1.3))):
        ms, ratios = {OURS: 1.0, BNB: 0.95, INT4: int4[1]}, {BNB: (0.9, 0.95, 1.1), INT4: int4}
        found.append(Row("linear", "4096x14336", M, 2, "out", ms, ratios))
    for dtype in ("bf16", "fp32"):
        ms, ratios = {OURS: 4.0, f"dense {dtype}": 2.0}, {f"dense {dtype}": (0.4, 0.5, 0.6)}
        found.append(Row("linear", "4096x4096", 1, 2, "out", ms, ratios, 1, (0.2, 0.25, 0.3), dtype=dtype, isa="avx2"))
    return found


def test_every_shape_stands_once_with_the_models_that_have_it():
    names = shapes.layer_names()
    assert names[4096, 4096] == "Llama-7B q, k, v, o; Llama-3-8B q, o; Mistral-7B q, o"
    assert names[192, 576] == "SmolLM2-135M k, v"
    assert set(shapes.FOCUS) <= set(names)


def test_sides_take_turns_and_another_one_begins_each_round():
    clock = Clock()
    sides = {"a": clock.side("a", 0.2), "b": clock.side("b", 0.3)}
    samples = harness.alternate(sides, seconds=0.0, clock=clock)
    assert samples == {"a": pytest.approx([200.0] * 5), "b": pytest.approx([300.0] * 5)}
    assert clock.calls == ["a", "b", *["a", "b", "b", "a"] * 2, "a", "b"]  # the first two are the untimed calls


def test_rounds_fill_the_time_and_short_calls_are_repeated():
    clock = Clock()
    samples = harness.alternate({"a": clock.side("a", 0.001)}, seconds=0.0495, clock=clock)
    assert len(samples["a"]) == 10  # of 5 ms each, in 49.5 ms
    assert len(clock.calls) == 2 + 10 * 5
    assert len(harness.alternate({"a": clock.side("a", 0.001)}, seconds=100, clock=clock)["a"]) == harness.MOST_ROUNDS


def test_a_peer_with_very_long_calls_is_timed_once_but_ours_is_not():
    clock = Clock()
    sides = {OURS: clock.side(OURS, 2.0), "slow": clock.side("slow", 3.0), "fast": clock.side("fast", 0.5)}
    samples = harness.alternate(sides, seconds=0, clock=clock, once_after=1.0)
    assert samples["slow"] == [3000.0]
    assert len(samples[OURS]) == len(samples["fast"]) == harness.LEAST_ROUNDS
    assert harness.ratios(samples["slow"], samples[OURS]) == pytest.approx((1.5, 1.5, 1.5))


def test_a_warm_side_is_called_untimed_first_unless_its_calls_are_long():
    clock = Clock()
    harness.alternate({"short": clock.side("short", 0.004), "long": clock.side("long", 0.03)}, 0, True, clock=clock)
    assert clock.calls.count("short") == 2 + harness.LEAST_ROUNDS * 2
    assert clock.calls.count("long") == 2 + harness.LEAST_ROUNDS


def test_turns_are_taken_from_samplers():
    order = []
    samplers = {name: lambda name=name: order.append(name) or float(len(order)) for name in ("a", "b")}
    samples = harness.take_turns(samplers, seconds=-1.0)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [1, 4, 5, 8, 9], "b": [2, 3, 6, 7, 10]}


def test_a_row_is_disturbed_by_what_other_processes_use(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(harness, "STAT", stat)
    assert harness.watch_others()() is None
    stat.write_text("cpu  1000 0 0 5000 70 0 0 0 0 0\ncpu0 1 1 1 1\n", encoding="utf-8")
    others = harness.watch_others()
    stat.write_text("cpu  1000 0 0 9000 90 0 0 0 0 0\n", encoding="utf-8")  # idle and waiting for a disk
    assert not harness.is_disturbed(others())
    stat.write_text(
        "cpu  900000 0 0 9000 90 0 0 100000 0 0\n", encoding="utf-8"
    )  # in use, and stolen from this virtual machine
    assert harness.is_disturbed(others())


def test_ratios_are_of_rounds_and_the_floor_is_over_our_time():
    samples = {OURS: [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], DENSE: [3.0, 6.0, 12.0, 24.0, 48.0, 96.0]}
    row = harness.row_of(samples, "linear", (2, 3), 1, 2, "out", floor_ms=3.0)
    assert row.shape == "2x3"
    assert row.ms == {OURS: 6.0, DENSE: 18.0}
    assert row.ratios == {DENSE: (3.0, 3.0, 3.0)}
    assert row.share == pytest.approx((3 / 16, (3 / 4 + 3 / 8) / 2, 3 / 2))


def test_the_floor_is_the_longer_of_moving_and_computing():
    assert limits.floor_ms(10e9, gb_s=20) == 500
    assert limits.floor_ms(10e9, gb_s=20, flops=1e12, gflop_s=1000) == 1000
    assert limits.floor_ms(10e9, gb_s=5, flops=1e12, gflop_s=1000) == 2000


def test_floors_of_products_and_moves(monkeypatch):
    monkeypatch.setattr(limits, "_read_gb_s", lambda threads, nbytes: 10.0 if nbytes >= limits.cache_bytes() else 100.0)
    monkeypatch.setattr(limits, "_copy_gb_s", lambda threads, nbytes: 5.0 if nbytes >= limits.cache_bytes() else 50.0)
    monkeypatch.setattr(limits, "_product_gflop_s", lambda threads, dtype: 1000.0)
    machine = limits.Limits()
    assert machine.product_ms(10**6, 0, "out", passes=2) == pytest.approx(0.2)
    assert machine.product_ms(10**6, 0, "in") == pytest.approx(0.01)
    assert machine.product_ms(10**6, 10**9, "in") == pytest.approx(1.0)
    assert machine.move_ms(10**6, "out") == pytest.approx(0.2)
    assert machine.move_ms(10**6, "in") == pytest.approx(0.02)


def test_goals_are_read_from_the_row_with_all_threads_out_of_cache():
    verdicts = {(work, goal): (measured, spread, verdict) for work, goal, measured, spread, verdict
                in goals.goal_rows(rows())}  # fmt: skip
    assert verdicts["quantize", f">= 100.00x {BNB_DQ}"] == ("64.00x", "60.00x-66.00x", "not met")
    assert verdicts["quantize", ">= 60% of the floor"] == ("40%", "38%-41%", "not met")
    assert verdicts["linear, M=1", f">= 1.20x {BNB}"] == ("1.50x", "1.25x-1.75x", "met")
    assert verdicts["linear, M=1", f">= 4.00x {DENSE}"] == ("3.00x", "2.75x-3.25x", "not met")
    assert verdicts["linear, M=16", f">= 1.50x {DENSE}"][::2] == ("3.00x", "met")
    assert verdicts["linear, M=512", f">= 0.95x {DENSE}"] == ("", "", "not measured")
    assert verdicts["qlora step", f">= 1.10x {BNB}"][2] == "met"
    assert verdicts["qlora step", f">= 0.95x {DENSE}"][2] == "met"
    assert len(verdicts) == len(goals.GOALS)


def test_the_worst_of_several_rows_counts():
    long = "linear, M=1..4, K >= 11008"
    verdicts = {(work, goal): (measured, verdict) for work, goal, measured, _, verdict in goals.goal_rows(rows())}
    assert verdicts[long, f">= 1.10x {INT4}"] == ("0.90x", "not met")
    assert verdicts[long, f">= 1.10x {BNB}"] == ("0.95x", "not met")
    assert verdicts["every row", f">= 1.00x {DENSE}"] == ("0.50x", "not met")  # with AVX2 forced
    assert verdicts["every row", f">= 1.00x {INT4}"] == ("0.90x", "not met")


def test_the_rule_names_the_rows_in_which_a_peer_was_faster():
    limit = Row("dequantize out=", "4096x4096", None, 2, "out", {OURS: 2.0}, {"copy_ of bf16": (0.5, 0.5, 0.5)})
    broken = {(row.op, row.shape, row.M, row.dtype): set(faster) for row, faster in goals.broken([*rows(), limit])}
    assert broken == {
        ("qlora step", "a model", None, "bf16"): {DENSE},
        ("linear", "4096x14336", 1, "bf16"): {BNB, INT4},
        ("linear", "4096x14336", 4, "bf16"): {BNB},
        ("linear", "4096x4096", 1, "bf16"): {DENSE},
        ("linear", "4096x4096", 1, "fp32"): {"dense fp32"},
    }
    assert goals.rule([*rows(), limit]) == f"{len(rows()) - 5} of {len(rows())} rows are not slower than any peer"
    always, beyond, within, spread = report.rule_lists(rows())
    assert always.startswith("Slower in four of five rounds")
    assert "- linear 4096x4096, M=1, 2 threads, avx2, not cached, fp32: 0.50 (0.40-0.60) of dense fp32" in beyond
    assert within.startswith("Slower by the median")
    assert "- linear 4096x14336, M=4, 2 threads, not cached: 0.95 (0.90-1.10) of bitsandbytes" in spread


def test_rows_with_a_forced_instruction_set_have_a_table_of_their_own():
    usual, forced = report.op_table(rows(), "out"), report.forced_table(rows(), "avx2")
    assert "25%" not in usual
    assert [line.split("|")[4].strip() for line in forced.splitlines()[2:]] == ["bf16", "fp32"]


def test_csv_gives_the_rows_back(tmp_path):
    path = tmp_path / "a.csv"
    report.write_csv(path, rows(), ABOUT)
    back, about = report.read_csv(path)
    assert about == ABOUT
    assert len(back) == len(rows())
    for was, now in zip(rows(), back):
        assert now == was
    header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {"command", "commit", "machine", "torch", "threads", "cache", "date"} <= set(header)


def test_pictures_are_drawn_and_small(tmp_path):
    path = tmp_path / "a.csv"
    report.write_csv(path, rows(), ABOUT)
    pictures = plots.draw(*report.read_csv(path), path)
    assert [picture.name for picture in pictures] == ["a-speed.png", "a-floor.png"]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert 10_000 < picture.stat().st_size < 100_000


def test_nothing_is_drawn_without_rows_for_it(tmp_path):
    assert plots.draw([row for row in rows() if row.op == "qlora step"], ABOUT, tmp_path / "a.csv") == []


@pytest.mark.parametrize("document", report.SECTIONS, ids=lambda path: path.name)
def test_a_document_shows_the_csv_that_it_names(document):
    """`python -m benchmarks --docs` mends it."""
    text = document.read_text(encoding="utf-8")
    assert report.with_section(document) == text
    picture = report.named_in(document).with_suffix("").name + "-speed.png"
    assert f"benchmarks/results/{picture})" in text


def test_a_section_is_made_of_another_csv_where_one_is_given(tmp_path):
    path = tmp_path / "a.csv"
    report.write_csv(path, rows(), ABOUT)
    plots.draw(*report.read_csv(path), path)
    for document, pictures in ((report.README, 1), (report.SPEED, 2)):
        section = report.MARKED.search(report.with_section(document, path))[0]
        assert section.startswith("<!-- speed: a.csv -->\nOn A CPU, 2 cores, 2 threads, native avx2 kernels")
        links = re.findall(r"\]\((.+?)\)", section)
        assert [(document.parent / link).resolve() for link in links] == [
            tmp_path / f"a-{kind}.png" for kind in ("speed", "floor")[:pictures]
        ]
        assert all(len(line) <= report.WIDTH for line in section.splitlines() if not line.startswith("!["))


@pytest.mark.parametrize(
    ("now_over_then", "expected"),
    [((1.02, 1.08, 1.2), True), ((0.98, 1.08, 1.2), False), ((1.01, 1.04, 1.06), False), ((0.8, 0.9, 0.95), False)],
)
def test_a_regression_is_over_five_percent_and_outside_the_spread(now_over_then, expected):
    assert compare.is_regression(now_over_then) == expected


@pytest.mark.parametrize(("now_ms", "status", "said"), [(2.0, 0, "nothing is slower"), (2.2, 1, "slower by more")])
def test_a_comparison_ends_with_status_1_where_something_is_slower(monkeypatch, capsys, now_ms, status, said):
    class Worker(nullcontext):
        implementation = "native"

        def __init__(self, tree: str) -> None:
            super().__init__(self)
            self.tree = Path(tree)

        def milliseconds(self, case: int) -> float:
            return now_ms if self.tree == ROOT and case == 3 else 2.0

    monkeypatch.setattr(compare, "Worker", Worker)
    monkeypatch.setattr(compare, "built", lambda base: nullcontext("elsewhere"))
    monkeypatch.setattr(compare, "git", lambda *arguments: "abc")
    assert compare.main(["main", "--rounds", "5"]) == status
    text = capsys.readouterr().out
    assert said in text
    assert text.count("SLOWER") == status


def test_both_versions_of_a_comparison_run_here(native_library):
    """A worker answers with milliseconds, for the package that it was pointed at."""
    small = compare_worker.CASES.index((compare_worker.linear, 576, 576, 1))
    with compare.Worker(ROOT) as now, compare.Worker(ROOT) as then:
        times = [worker.milliseconds(small) for worker in (now, then, now)]
    assert all(0 < ms < 1000 for ms in times)


def test_a_wrong_product_is_not_timed():
    a, matrix = torch.randn(20, 64, dtype=torch.bfloat16), torch.randn(64, 96)
    exact = a.double() @ matrix.double()
    checks.assert_as_exact_as_dense(exact.bfloat16(), a, matrix, "right")
    wrong = exact.clone()
    wrong[19] *= 1.1
    with pytest.raises(AssertionError, match="wrong: error"):
        checks.assert_as_exact_as_dense(wrong.bfloat16(), a, matrix, "wrong")
    with pytest.raises(AssertionError, match="theirs"):
        checks.assert_close_to_dense({"theirs": 1.2 * exact, DENSE: exact}, DENSE, "scaled")


def test_small_experts_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(limits.Limits, "product_ms", lambda *arguments, **options: 0.001)
    plan = harness.Plan((1, 9), (1,), ("out",), seconds=0.01)
    found = list(bench_grouped_linear.rows(shapes.ExpertsShape(6, 2, 64, 128), limits.Limits(), plan))
    assert [(row.op, row.shape, row.M) for row in found] == [
        (op, "6x64x128", tokens) for tokens in (1, 9) for op in ("grouped linear", "grouped + dgrad")
    ]
    for row in found:
        assert set(row.ms) == {OURS, bench_grouped_linear.GROUPED_MM, DENSE}
        assert all(ms > 0 for ms in row.ms.values())


def test_experts_with_lora_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(limits.Limits, "product_ms", lambda *arguments, **options: 0.001)
    plan = harness.Plan((9,), (1,), ("out",), seconds=0.01)
    (row,) = bench_grouped_lora.rows(shapes.ExpertsShape(6, 2, 64, 128), limits.Limits(), plan)
    assert (row.op, row.shape, row.M) == ("grouped lora step", "6x64x128", 9)
    assert set(row.ms) == {OURS, bench_grouped_lora.COMPOSED, bench_grouped_lora.MERGED}


def test_experts_get_every_row_that_was_routed():
    counts = shapes.ExpertsShape(6, 2, 64, 128).route(9)
    assert len(counts) == 6
    assert sum(counts) == 18


def test_one_small_run_prints_its_row_and_writes_its_csv(tmp_path):
    path = tmp_path / "small.csv"
    command = [sys.executable, "-m", "benchmarks", "linear", "--shapes", "64x128", "--rows", "4", "--threads", "1"]
    command += ["--cache", "in", "--seconds", "0.01", "--csv", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "linear           64x128          4  1t in" in done.stdout
    (row,), about = report.read_csv(path)
    assert {OURS, BNB, BNB_DQ, DENSE, INT4} <= set(row.ms)
    assert all(ms > 0 for ms in row.ms.values())
    assert row.share[1] > 0
    assert about["command"].endswith(f"linear {' '.join(command[4:])}")
