"""The CUDA kernels under the race detector: every test of them on the host executor, in a process that has it."""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
from support import cuda_backend
from support.paths import ROOT

# The stem of a test file, and the files whose kernels it launches.
STEMS = {
    "quantize": ("quantize", "quantize_absmax"),
    "dequantize": ("dequantize",),
    "linear": ("linear_small", "linear_tiled", "product_any", "reduce_splits", "scaled_copy", "lora_term"),
    "linear_dgrad": ("linear_dgrad_tiled",),
    "grouped_linear": ("grouped_linear", "grouped_linear_dgrad", "grouped_offsets"),
    "grouped_terms": (),
    "lora_grad": ("lora_grad",),
    "grouped_lora_inner": ("grouped_lora_inner",),
    "grouped_lora_grad": ("grouped_lora_grad",),
    "sort_by_expert": ("sort_by_expert",),
    "combine_experts": ("combine_experts",),
}
# Kernels that the tests of another stem launch.
ELSEWHERE = {"dequantize_experts_kernel": "grouped_linear", "lora_grad_any_kernel": "lora_grad"}


def kernels_of(file: str) -> set[str]:
    source = (ROOT / "csrc" / "cuda" / f"{file}.cu").read_text()
    return set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", source))


def launched_by(stem: str) -> set[str]:
    own = {kernel for file in STEMS[stem] for kernel in kernels_of(file)}
    return own - set(ELSEWHERE) | {kernel for kernel, other in ELSEWHERE.items() if other == stem}


def test_every_kernel_is_run_under_the_detector():
    files = [path for path in (ROOT / "csrc" / "cuda").glob("*.cu*") if "__global__" in path.read_text()]
    assert {file for files in STEMS.values() for file in files} == {path.stem for path in files}
    assert sum(len(kernels_of(path.stem)) for path in files) == sum(
        path.read_text().count("__global__") for path in files
    )
    assert sum(len(launched_by(stem)) for stem in STEMS) == sum(len(kernels_of(path.stem)) for path in files)


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(cuda_backend.build.CXX) is None,
    reason="the host executor needs an x86-64 machine with a C++ compiler",
)
@pytest.mark.parametrize("stem", STEMS)
def test_no_kernel_has_a_race(tmp_path, stem):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "executor"]
    command += ["-m", "not slow", f"tests/contract/test_{stem}.py"]
    log = tmp_path / "kernels"
    env = os.environ | {cuda_backend.RACES_VARIABLE: "1", cuda_backend.KERNELS_VARIABLE: str(log)}
    env.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"^\d+ passed", result.stdout.splitlines()[-1]), "none ran"
    ran = {kernel.partition("<")[0] for kernel in log.read_text().splitlines()}
    assert launched_by(stem) <= ran
