"""The CUDA kernels under AddressSanitizer: every test of them on the host executor, in a process that has it."""

import os
import re
import subprocess
import sys

import pytest
from executor.build import asan_environment
from support import cuda_backend
from support.paths import ROOT

STEMS = (
    "quantize",
    "dequantize",
    "linear",
    "linear_dgrad",
    "grouped_linear",
    "lora_grad",
    "sort_by_expert",
    "combine_experts",
    "ops",
)


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_no_kernel_reads_or_writes_outside_of_its_tensors(executor, stem):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "executor"]
    env = os.environ | asan_environment() | {cuda_backend.ASAN_VARIABLE: "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    command.append(f"tests/contract/test_{stem}.py")
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"^\d+ passed", result.stdout.splitlines()[-1]), "none ran"
