"""Every Triton kernel compiled for eight targets without a device: no spills, shared memory that the target has."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from support.paths import TESTS

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # two minutes of compilers
NVIDIA = tuple(f"cuda:{arch}" for arch in (80, 86, 89, 90, 100, 120))
AMD = ("hip:gfx942", "hip:gfx1100")


@pytest.fixture(scope="module")
def reports():
    """target -> its report to come: two processes at a time, of a fourth of a minute to half a minute each."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled")

    def report(target: str) -> dict:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, TESTS / "support" / "triton_compile.py", target]
        result = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future] = {target: pool.submit(report, target) for target in NVIDIA + AMD}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_no_spills_and_shared_memory_within_the_limit(reports, target):
    report = reports[target].result()
    kernels = {row["kernel"] for row in report["kernels"]}
    assert kernels == {
        "quantize_kernel", "superblock_sums_kernel", "mean_kernel", "scale_codes_kernel", "dequantize_kernel",
        "linear_kernel", "linear_dgrad_kernel", "grouped_linear_kernel", "grouped_linear_dgrad_kernel",
        "lora_grad_kernel", "grouped_lora_inner_kernel", "grouped_lora_grad_kernel", "reduce_kernel", "combine_kernel",
        "combine_dgrad_kernel", "combine_wgrad_kernel", "quantize_int8_kernel", "dequantize_int8_kernel",
    }  # fmt: skip
    for row in report["kernels"]:
        assert row["spilled"] == 0, row
        assert row["shared"] <= report["shared_limit"], row


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_no_denormal_is_flushed_and_no_scale_contracted(reports, target):
    """A contracted scale would be rounded once where the format rounds twice. (AMD divides by means of fma.)"""
    for row in reports[target].result()["kernels"]:
        encodes = row["kernel"] in ("quantize_kernel", "quantize_int8_kernel", "scale_codes_kernel")
        assert not row["flushes"], row
        assert row["inexact"] == 0, row
        if encodes:
            assert row["exact"] > 0, row
        if row["kernel"] in ("dequantize_kernel", "dequantize_int8_kernel") or (encodes and target in NVIDIA):
            assert row["fma"] == 0, row


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_m_does_not_recompile(reports, target):
    """One kernel for all M of a bucket; for M from 1 to 321 one a bucket, a sum of splits, a dequantization."""
    of_bucket, of_all, of_experts = reports[target].result()["by_rows"]
    assert of_bucket == of_experts == 1
    assert of_all <= 5 + 2
