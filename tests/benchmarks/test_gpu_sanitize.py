"""What runs under compute-sanitizer, without it: by the reference, and on the host executor."""

import re

import pytest
from support.gpu_run import Force

from benchmarks.gpu import cuda_report, run, sanitize, sides
from nf4kernels.backends import native

NO_TILES = dict.fromkeys(sanitize.PIPELINED, ())


@pytest.fixture
def few(monkeypatch):
    """One shape, and few rows of it; no scales or experts beyond a turn of their loops."""
    monkeypatch.setattr(sanitize, "SHAPES", ((33, 71),))
    monkeypatch.setattr(sanitize, "ROWS", dict.fromkeys(sanitize.ROWS, (9,)))
    monkeypatch.setattr(sanitize, "scales", lambda: iter(()))


def test_the_sanitizers_script_calls_every_op_with_every_kernel(capsys, few):
    force = Force(refuses=("small",))
    tiles = NO_TILES | {"linear": ("16x64x64",)}
    assert sanitize.main("cpu", force, tiles, 1) == 0
    assert set(sanitize.KERNELS) == set(sides.KERNELS)
    assert force.seen == set(sanitize.KERNELS) - {"small"}
    assert {case.op for case in sanitize.cases(NO_TILES, 1)} == {
        "quantize", "dequantize", "linear", "linear_dgrad", "lora_grad", "sort_by_expert",
        "combine_experts", "combine_experts_dgrad", "combine_experts_wgrad",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith(run.SANITIZED_BEGINS)
    # 3 dtypes, 2 ops, with LoRA or not; and the 8 products in which small fills its stages again
    assert re.search(r"\d+ calls, 0 wrong, 20 refused by a forced kernel", printed)


def test_the_sanitizers_script_runs_every_kernel_and_reuses_every_stage(monkeypatch, executor_ops):
    """The kernels themselves, on the host executor. A stage that is filled once shows no fetch that comes too soon."""
    monkeypatch.setattr(sanitize, "SHAPES", ((32, 192), (33, 135)))
    monkeypatch.setattr(sanitize, "ROWS", dict.fromkeys(sanitize.ROWS, (9,)))
    tiles = {op: native.cuda_tiles(executor_ops.executor.library, op) for op in sanitize.PIPELINED}
    executor_ops.pretend(90, 2)
    assert sanitize.main("cpu", executor_ops.running, tiles, 2, executor_ops.ops) == 0
    executor_ops.executor.library.nf4kernels_executor_unknown_stream()  # its sums take a second launch
    one_tile = NO_TILES | {"linear": tiles["linear"][:1]}
    assert sanitize.main("cpu", executor_ops.running, one_tile, 2, executor_ops.ops) == 0
    executor_ops.executor.library.nf4kernels_executor_forget_streams()
    ran = {launch.kernel.partition("<")[0] for launch in executor_ops.launches()}
    assert ran == {kernel.kernel.partition("<")[0] for kernel in cuda_report.read_csv()}
    pipelines = executor_ops.executor.pipelines()
    assert all(pipeline.is_reused for pipeline in pipelines), pipelines
    tiled = {pipeline.kernel for pipeline in pipelines if "tiled_kernel" in pipeline.kernel}
    assert len(tiled) == 4 * sum(map(len, tiles.values())), "every tile in both forms of scales and both dtypes"


def test_the_sanitizers_script_finds_a_wrong_result(monkeypatch, few):
    right = sanitize.reference.lora_grad
    monkeypatch.setattr(sanitize.reference, "lora_grad", lambda *args: 1.1 * right(*args))
    assert sanitize.main("cpu", Force(), NO_TILES, 1) == 3 * 3 + 2  # dtypes; plain, transposed, rank 5; splits
