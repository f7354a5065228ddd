"""The committed launches against what the launchers ask for, on the host executor."""

import pytest
from executor.executor import SM_90_SHARED

from benchmarks.gpu import launches
from benchmarks.gpu.launches import Launch, Plan, Product

RENEW = "python -m benchmarks.gpu.launches --renew"


@pytest.fixture
def library(executor_ops):
    executor_ops.executor.set(shared_limit=SM_90_SHARED)
    return executor_ops


def test_the_committed_launches_are_those_of_this_version(library):
    """Every seventh of them, and no gemm, whose product takes time here: a change of a tile or split shows in many."""
    committed = launches.read_csv()
    found = [product for product in launches.products() if product.kernel != "dequantize_gemm"][::7]
    assert len(found) > 70
    for product in found:
        now = launches.planned(library.executor, library.ops, product)
        assert committed[product] == now, f"{product}: if it is meant, {RENEW}"
    assert set(committed) == set(launches.products())


def test_a_plan_runs_nothing_and_has_the_launches_of_a_run(library):
    product = Product(90, 4, "linear", 64, 256, 5, "small")
    plan = launches.planned(library.executor, library.ops, product)
    assert plan.is_chosen
    (first,) = [launch for launch in plan.launches if launch.kernel.startswith("linear_small")]
    assert first.threads > 0
    gemm = launches.planned(library.executor, library.ops, Product(90, 4, "linear", 64, 256, 600, "dequantize_gemm"))
    assert gemm.is_chosen
    assert [launch.kernel.partition("<")[0] for launch in gemm.launches] == ["dequantize_kernel"]


def test_plans_survive_their_file(tmp_path):
    product = Product(90, 132, "linear_dgrad", 64, 128, 3, "tiled")
    plan = Plan((Launch("a_kernel<BFloat16, 2>", (3, 2, 1), 128, 4096, 2), Launch("reduce<float>", (1, 1, 1), 32, 0)),
                True, (16, 128))  # fmt: skip
    launches.write_csv(tmp_path / "plans.csv", {product: plan})
    assert launches.read_csv(tmp_path / "plans.csv") == {product: plan}
