"""The tuning of Triton's products, with a clock that is a formula; and one measurement under Triton's interpreter."""

import importlib
import time
from dataclasses import replace

import pytest
import torch


@pytest.fixture
def choose(interpreter):
    return interpreter.backend.choose


@pytest.fixture
def tuning(interpreter):
    return importlib.import_module("benchmarks.gpu.tune_triton")


def distance(config, wanted) -> float:
    names = ("BLOCK_M", "BLOCK_N", "warps", "stages", "depth")
    return 1 + sum(abs(getattr(config, name) / getattr(wanted, name) - 1) for name in names)


def test_each_bucket_gets_its_quickest_configuration(choose, tuning):
    start = choose.table_for("sm_80")
    wanted = {4: choose.Config(16, 32, 2, 5, 512), 65536: choose.Config(64, 128, 8, 2, 4096)}
    asked, said = [], []

    def timer(op, M, path, config):
        asked.append((op, M, path, config))
        if path == "dequantize_gemm":
            return 1.0 if (op, M >= 256) == ("linear", True) else 9.0
        return distance(config, wanted[4 if M <= 16 else 65536])

    table = tuning.tune(timer, start, "measured by a formula", said.append)
    for op in choose.PRODUCTS:
        assert [most for most, _ in table.configs[op]] == [most for most, _ in start.configs[op]]
        for most, config in table.configs[op]:
            assert config == wanted[4 if most <= 16 else 65536], (op, most)
    assert table.dequantize_gemm_from["linear_dgrad"] > max(tuning.GEMM_M)
    assert table.dequantize_gemm_from["linear"] > max(tuning.GEMM_M), "a tie goes to the fused kernel"
    assert max(M for _, M, _, _ in asked) == max(tuning.GEMM_M)
    assert len(said) == sum(len(buckets) for buckets in start.configs.values()) + 2
    assert choose.Table.from_json(table.to_json()) == table


def test_dequantize_gemm_from_where_it_is_always_faster(tuning):
    rows = (32, 64, 128, 256)
    assert tuning.gemm_from(lambda M: M, lambda M: 100, rows) == 128
    assert tuning.gemm_from(lambda M: M, lambda M: 0, rows) == 32
    assert tuning.gemm_from(lambda M: M, lambda M: 1000, rows) == 257
    assert tuning.gemm_from(lambda M: M, lambda M: 0 if M in (32, 256) else 1000, rows) == 256


def test_a_configuration_that_does_not_fit_is_passed_over(choose, tuning):
    start = choose.Config(16, 64, 4, 4, 2048)
    best = tuning.best_config(start, lambda c: tuning.TOO_LARGE if c.stages > 3 else 10 - c.stages)
    assert best.stages == 3
    with pytest.raises(RuntimeError, match="no configuration near"):
        tuning.best_config(start, lambda c: tuning.TOO_LARGE)


class Cpu:
    device, cache_bytes = torch.device("cpu"), 1

    def __init__(self) -> None:
        self.runs = 0

    def sampler(self, run, copies):
        run()
        self.runs += 1
        return lambda: 2.0


def test_what_is_timed_is_the_forced_product(choose, tuning, monkeypatch):
    seen = []

    def recorded(op):
        run = tuning.OPS[op]

        def product(*arguments):
            seen.append((op, dict(choose._forced)))
            return run(*arguments)

        return product

    monkeypatch.setattr(tuning, "OPS", {op: recorded(op) for op in choose.PRODUCTS})
    bench = tuning.Bench(Cpu(), time.perf_counter() + 1000, ((64, 64), (8, 128)), seconds=0)
    config = choose.Config(16, 32, 4, 2, 64)
    for op in choose.PRODUCTS:
        for path in choose.PATHS:
            assert bench(op, 3, path, config) == pytest.approx(2.0)
            assert seen[-1] == (op, {"path": path, "config": config})
    assert bench.machine.runs == 2 * 2 * 2
    assert choose._forced == {"path": None, "config": None}


def test_a_wrong_product_is_not_timed(choose, tuning, monkeypatch):
    monkeypatch.setattr(tuning, "OPS", {"linear": lambda x, *weight: torch.zeros(3, 64, dtype=x.dtype)})
    bench = tuning.Bench(Cpu(), time.perf_counter() + 1000, ((64, 64),), seconds=0)
    with pytest.raises(AssertionError, match=r"linear fused Config.*error 1\.00"):
        bench("linear", 3, "fused", choose.Config(16, 32, 4, 2, 64))


def test_nothing_is_written_when_the_time_is_over(choose, tuning, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "Cuda", lambda: type("Gpu", (Cpu,), {"name": "A Test GPU"})())
    with pytest.raises(TimeoutError, match="nothing was written"):
        tuning.main(["--seconds", "0", "--output", str(tmp_path / "table.json")])
    assert not (tmp_path / "table.json").exists()


def test_the_command_writes_a_table_that_is_read(choose, tuning, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "Cuda", lambda: type("Gpu", (Cpu,), {"name": "A Test GPU"})())
    monkeypatch.setattr(tuning, "Bench", lambda machine, deadline: lambda op, M, path, config: config.depth * 1.0)
    tuning.main(["--output", str(tmp_path / "table.json")])
    table = choose.Table.from_json((tmp_path / "table.json").read_text())
    assert table.origin.startswith("measured on A Test GPU, torch ")
    assert {config.depth for buckets in table.configs.values() for _, config in buckets} == {512}
    assert replace(table, origin="") != replace(choose.table_for("sm_80"), origin="")
