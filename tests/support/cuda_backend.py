"""The CUDA kernels, launchers and bindings on a CPU, as torch.ops.nf4kernels_executor."""

from pathlib import Path

import torch
from executor import build
from executor.executor import Executor
from torch.utils import cpp_extension

from nf4kernels import ops
from nf4kernels.backends import native

NAMESPACE = "nf4kernels_executor"
ASAN_VARIABLE = "NF4KERNELS_EXECUTOR_ASAN"  # 1: the tests of this process run the kernels under AddressSanitizer
RACES_VARIABLE = "NF4KERNELS_EXECUTOR_RACES"  # 1: under the race detector


def load(asan: bool = False, races: bool = False, csrc: Path = build.CSRC) -> Executor:
    """Builds csrc/cuda and its binding for the host executor, and registers the ops for CPU tensors: once a process.

    With asan under AddressSanitizer, which the process must have been started with: `executor.build.asan_environment`.
    With races under the race detector. Of `csrc`, or of a copy of it.
    """
    sources = [*sorted(csrc.glob("cuda/*.cu")), *sorted(csrc.glob("bindings/cuda*.cpp")), csrc / "rounded_code.cpp"]
    flags = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    name = "cuda" if csrc == build.CSRC else csrc.parent.name
    path = build.build(name, sources, flags, link, asan, races, csrc)
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in ops.SCHEMAS:
        library.define(schema)
    executor = Executor(path)
    native.register_cuda_ops(executor.library, NAMESPACE, "CPU")
    native.know_codebooks(executor.library)
    executor.schemas = library  # they live as long as this object
    return executor
