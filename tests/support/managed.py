"""csrc/bindings/cuda_managed.cpp on a CPU: managed memory is malloc's, and each call of the CUDA runtime is logged."""

import ctypes
from pathlib import Path

from executor import build


def load(cudart: int = 13000) -> ctypes.CDLL:
    """Compiled as for this version of CUDA's runtime, 1000 * major + 10 * minor."""
    source = build.CSRC / "bindings" / "cuda_managed.cpp"
    library = ctypes.CDLL(str(path(source, cudart)))
    library.nf4_executor_managed_calls.restype = ctypes.c_char_p
    alloc, free = library.nf4kernels_cuda_managed_alloc, library.nf4kernels_cuda_managed_free
    alloc.argtypes, alloc.restype = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    free.argtypes, free.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p], None
    return library


def path(source: Path, cudart: int) -> Path:
    return build.build(f"managed-{cudart}", [source], [f"-DCUDART_VERSION={cudart}"])


def calls(library: ctypes.CDLL) -> list[str]:
    """Those of the runtime since this was last asked."""
    return library.nf4_executor_managed_calls().decode().splitlines()
