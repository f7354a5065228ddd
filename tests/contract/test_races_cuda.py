"""The CUDA kernels under the race detector: the sanitizer's script, which runs every kernel, fills each stage of a
pipeline again and takes both ways to add splits, in a process that has the detector.

`NF4KERNELS_EXECUTOR_RACES=1 pytest -k executor tests/contract` puts every test of the kernels under it: half an hour.
"""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
from support import cuda_backend
from support.paths import ROOT

SCRIPT = "tests/benchmarks/test_gpu_sanitize.py::test_the_sanitizers_script_runs_every_kernel_and_reuses_every_stage"


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(cuda_backend.build.CXX) is None,
    reason="the host executor needs an x86-64 machine with a C++ compiler",
)
def test_no_kernel_has_a_race():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", SCRIPT]
    env = os.environ | {cuda_backend.RACES_VARIABLE: "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"^1 passed", result.stdout.splitlines()[-1]), result.stdout
