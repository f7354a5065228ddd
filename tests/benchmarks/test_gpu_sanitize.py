"""What runs under compute-sanitizer, without it: by the reference, and on the host executor."""

import re

from support.gpu_run import Force

from benchmarks.gpu import cuda_report, run, sanitize, sides


def test_the_sanitizers_script_calls_every_op_with_every_kernel(capsys, monkeypatch):
    monkeypatch.setattr(sanitize, "SHAPES", ((33, 71),))
    monkeypatch.setattr(sanitize, "ROWS", (9,))
    force = Force(refuses=("small",))
    assert sanitize.main("cpu", force) == 0
    assert force.seen == set(sides.KERNELS) - {"small"}
    ops = {op for _, op, _ in sanitize.cases()}
    assert ops == {
        "quantize", "quantize_absmax", "dequantize", "linear", "linear_dgrad", "lora_grad", "sort_by_expert",
        "combine_experts", "combine_experts_dgrad", "combine_experts_wgrad",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith(run.SANITIZED_BEGINS)
    assert re.search(r"\d+ calls, 0 wrong, 12 refused by a forced kernel", printed)  # 3 dtypes, 2 ops, with LoRA or not


def test_the_sanitizers_script_runs_every_kernel(monkeypatch, executor_ops):
    """The kernels themselves, on the host executor."""
    monkeypatch.setattr(sanitize, "SHAPES", ((32, 64), (33, 71)))
    monkeypatch.setattr(sanitize, "ROWS", (9,))
    assert sanitize.main("cpu", executor_ops.running, executor_ops.ops) == 0
    ran = {launch.kernel.partition("<")[0] for launch in executor_ops.launches()}
    assert ran == {kernel.kernel.partition("<")[0] for kernel in cuda_report.read_csv()}


def test_the_sanitizers_script_finds_a_wrong_result(monkeypatch):
    monkeypatch.setattr(sanitize, "SHAPES", ((33, 71),))
    monkeypatch.setattr(sanitize, "ROWS", (9,))
    right = sanitize.reference.lora_grad
    monkeypatch.setattr(sanitize.reference, "lora_grad", lambda *args: 1.1 * right(*args))
    assert sanitize.main("cpu", Force()) == 3
