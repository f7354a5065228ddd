"""Loads the compiled libraries and asks the CPU one which instruction set it runs."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CPU_LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"
ISA_VARIABLE = "NF4KERNELS_CPU_ISA"
NOT_BUILT = f"{CPU_LIBRARY.name} was not built (no C++ compiler at install time?)"


class CpuLibrary:
    """The loaded CPU library; loading it registers its ops for CPU tensors."""

    def __init__(self, path: Path) -> None:
        self.reason = "best that this CPU supports"
        torch.ops.load_library(path)
        self._library = ctypes.CDLL(str(path))
        for name in ("nf4kernels_cpu_isa", "nf4kernels_cpu_isa_list", "nf4kernels_force_cpu_isa"):
            getattr(self._library, name).restype = ctypes.c_char_p

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._library.nf4kernels_cpu_isa().decode()

    @property
    def isas(self) -> list[str]:
        """The instruction sets that this library has and this machine can run, best first."""
        return self._library.nf4kernels_cpu_isa_list().decode().split()

    def force_isa(self, isa: str) -> None:
        """Run `isa` from now on; ValueError, and nothing changed, for one that is unknown or that this CPU lacks."""
        error = self._library.nf4kernels_force_cpu_isa(isa.encode())
        if error is not None:
            raise ValueError(f"nf4kernels: {ISA_VARIABLE} {error.decode()}")
        self.reason = "forced"

    @contextmanager
    def running_isa(self, isa: str) -> Iterator[None]:
        """Run `isa` inside a `with` block; raises as `force_isa` does."""
        before, reason = self.isa, self.reason
        self.force_isa(isa)
        try:
            yield
        finally:
            self.force_isa(before)
            self.reason = reason


def load_cpu() -> CpuLibrary | None:
    """The CPU library, None where it was not built.

    Raises:
        ValueError: NF4KERNELS_CPU_ISA names what cannot be run here. OSError: the library does not load.
    """
    forced = os.environ.get(ISA_VARIABLE)
    if not CPU_LIBRARY.exists():
        if forced is not None:
            raise ValueError(f"nf4kernels: {ISA_VARIABLE} must be unset where {NOT_BUILT}, got {forced}")
        return None
    library = CpuLibrary(CPU_LIBRARY)
    if forced is not None:
        library.force_isa(forced)
        library.reason = f"forced by {ISA_VARIABLE}"
    return library
