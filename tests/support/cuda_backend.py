"""The CUDA kernels, launchers and bindings on a CPU, as torch.ops.nf4kernels_executor, and how tests call it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from executor import build
from executor.executor import SETTINGS, Executor, Launch
from support.paths import ROOT
from torch.utils import cpp_extension

from nf4kernels import ops
from nf4kernels.backends import native, select

NAMESPACE = "nf4kernels_executor"
ASAN_VARIABLE = "NF4KERNELS_EXECUTOR_ASAN"  # 1: the tests of this process run the kernels under AddressSanitizer


def load(asan: bool = False) -> Executor:
    """Builds csrc/cuda and its binding for the host executor, and registers the ops for CPU tensors: once a process.

    With asan under AddressSanitizer, which the process must have been started with: `executor.build.asan_environment`.
    """
    sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), *sorted(ROOT.glob("csrc/bindings/cuda*.cpp"))]
    sources.append(ROOT / "csrc/rounded_code.cpp")
    flags = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    path = build.build("cuda", sources, flags, link, asan)
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in ops.SCHEMAS:
        library.define(schema)
    executor = Executor(path)
    native.register_cuda_ops(executor.library, NAMESPACE, "CPU")
    native.know_codebooks(executor.library)
    executor.schemas = library  # they live as long as this object
    return executor


@dataclass(frozen=True)
class CudaOps:
    """The CUDA ops, on the host executor or on a GPU."""

    ops: object  # as torch.ops.nf4kernels
    device: str
    executor: Executor | None  # None on a GPU

    def move(self, arguments: tuple) -> list:
        """An op's arguments with their tensors on the device."""
        return [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments]

    def set(self, **settings) -> None:
        """`Executor.set`, until the end of the test; nothing on a GPU."""
        if self.executor is not None:
            self.executor.set(**settings)

    def settings(self) -> Iterator[tuple[str, str]]:
        """Sets each schedule with each mode of copying in turn, and then the usual one; on a GPU one turn."""
        if self.executor is None:
            yield "device", "device"
            return
        for schedule, copies in SETTINGS:
            self.executor.set(schedule, copies)
            yield schedule, copies
        self.executor.set()

    def pretend(self, arch: int, multiprocessors: int) -> None:
        """What the choice of kernels sees of the executor's device, until the end of the test."""
        self.executor.library.nf4kernels_executor_device(arch, multiprocessors)

    def running(self, kernel: str) -> AbstractContextManager:
        """Every product by this kernel: any, small, tiled or dequantize_gemm."""
        library = select.cuda_library()[0].handle if self.executor is None else self.executor.library
        return native.running_kernel(library, kernel)

    def launches(self) -> list[Launch] | None:
        """The kernels that ran since the test began, by name; None on a GPU, which keeps no list."""
        return None if self.executor is None else self.executor.launches()
