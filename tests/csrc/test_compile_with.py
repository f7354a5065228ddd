"""The sources compile with a CUDA that is not installed; what a version lacks is found."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from support.paths import ROOT

from benchmarks.gpu import compile_with
from benchmarks.gpu.compile_with import Toolkit


def test_a_name_that_the_headers_lack_is_found(tmp_path):
    header = tmp_path / "include" / "cuda_runtime.h"
    header.parent.mkdir()
    header.write_text("struct cudaLaunchConfig_t; cudaFuncSetAttribute", encoding="utf-8")
    missing = compile_with.undeclared(Toolkit("0.0", tmp_path))
    assert "cudaLaunchKernelEx" in missing
    assert not {"cudaLaunchConfig_t", "cudaFuncSetAttribute"} & set(missing)


@pytest.mark.slow
def test_a_kernel_and_the_bindings_compile_with_cuda_12_4():
    """The oldest that is promised. All kernels: python -m benchmarks.gpu.compile_with."""
    kit = compile_with.toolkit("12.4")
    with ThreadPoolExecutor(1) as pool:
        host, device = compile_with.results_of(kit, ["80"], [ROOT / "csrc/cuda/scaled_copy.cu"], pool)
    assert (host.errors, device.errors) == ([], [])
    assert len(device.kernels) == 2
    broken = kit.folder / "broken.cu"
    broken.write_text("__global__ void kernel(int* p) { *p = undefined; }", encoding="utf-8")
    assert "undefined" in compile_with.compile_kernels(kit, "80", broken, kit.folder / "broken.cubin")
