"""A file of the contract's tests on the host executor, in a process that has AddressSanitizer."""

import os
import re
import subprocess
import sys

from executor.build import asan_environment
from support import cuda_backend
from support.paths import ROOT


def run_under_asan(stem: str) -> None:
    """Run the tests of `stem`; AssertionError with the end of the output where one fails, or none ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "executor"]
    env = os.environ | asan_environment() | {cuda_backend.ASAN_VARIABLE: "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    command.append(f"tests/contract/test_{stem}.py")
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"^\d+ passed", result.stdout.splitlines()[-1]), "none ran"
