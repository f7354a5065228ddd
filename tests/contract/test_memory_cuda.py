"""The CUDA kernels under AddressSanitizer: every test of them on the host executor, in a process that has it."""

import os
import re
import subprocess
import sys

from executor.build import asan_environment
from support import cuda_backend
from support.paths import ROOT

STEMS = ("quantize", "dequantize", "linear", "linear_dgrad", "grouped_linear", "lora_grad", "ops")


def test_no_kernel_reads_or_writes_outside_of_its_tensors(executor):
    files = [f"tests/test_{stem}_cuda.py" for stem in STEMS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "executor_ops", *files]
    env = os.environ | asan_environment() | {cuda_backend.ASAN_VARIABLE: "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.fullmatch(r"\d+ passed, \d+ deselected in .*", result.stdout.splitlines()[-1]), "none was skipped"
