"""csrc/bindings/cuda_managed.cpp on a CPU: managed memory is malloc's, and each call of the CUDA runtime is logged."""

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from executor import build
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nf4kernels.optim import managed_memory, paged_adamw

SCALARS = False  # whether they are on the device, as the steps of a fused optimizer


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


class Device:
    """CUDA device 0 as optim/managed_memory.py meets it, on the CPU: what it does is listed in order in `done`.

    Inside `torch.cuda.use_mem_pool` new tensors are in the library's memory, copied from where torch made them.
    """

    def __init__(self, library: ctypes.CDLL, free: int = 1 << 30) -> None:
        self.library, self.free, self.pools, self.kept = library, free, True, 0
        self._done: list[str] = []
        library.nf4_executor_managed_fail(b"")
        calls(library)

    @property
    def done(self) -> list[str]:
        """Since this was last asked."""
        self.note()
        done, self._done = self._done, []
        return done

    def note(self, *what: str) -> None:
        """After the calls of the library's until now."""
        self._done += [*calls(self.library), *what]

    def snapshot(self) -> list[dict[str, int]]:
        """Of the pool: `kept` bytes of it are given back and not given out again."""
        return [{"total_size": 4096 + self.kept, "allocated_size": 4096}]

    def mem_get_info(self, device: int = 0) -> tuple[int, int]:
        self.note("ask what is free")
        return self.free, 2 << 30

    def empty_cache(self) -> None:
        self.note("empty cache")

    @contextmanager
    def use_mem_pool(self, pool: object, device: int) -> Iterator[None]:
        self.note("begin pool")
        with _Pooled(self) if self.pools else nullcontext():
            yield
        self.note("end pool")

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the library's memory, given back when its storage is."""
        pointer, nbytes = self.library.nf4kernels_cuda_managed_alloc(tensor.nbytes, 0, None), tensor.nbytes
        buffer = (ctypes.c_char * nbytes).from_address(pointer)
        copy = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        weakref.finalize(buffer, self.library.nf4kernels_cuda_managed_free, pointer, nbytes, 0, None)
        return copy.copy_(tensor)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if CPU tensors, but for scalars, were on cuda:0."""
        managed_memory.managed_memory.cache_clear()
        cuda = SimpleNamespace(handle=self.library)
        monkeypatch.setattr(managed_memory.select, "cuda_library", lambda: (cuda, ""))
        monkeypatch.setattr(paged_adamw, "_device", lambda tensor: 0 if tensor.dim() else -1)
        stream = SimpleNamespace(cuda_stream=7)
        for name, stand_in in (
            ("mem_get_info", self.mem_get_info), ("empty_cache", self.empty_cache),
            ("use_mem_pool", self.use_mem_pool), ("device", lambda device: nullcontext()),
            ("MemPool", lambda allocator: SimpleNamespace(snapshot=self.snapshot)), ("synchronize", lambda: None),
            ("current_stream", lambda device: stream),
            ("is_current_stream_capturing", lambda: False),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        allocator = SimpleNamespace(allocator=lambda: None)
        monkeypatch.setattr(torch.cuda.memory, "CUDAPluggableAllocator", lambda *names: allocator)


class _Pooled(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or not result.numel() or not (result.dim() or SCALARS):
            return result
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        known = {each.untyped_storage()._cdata for each in given}
        if isinstance(result, DTensor):  # whose own calls are made below this mode
            result._local_tensor = self.device.moved(result._local_tensor)
            return result
        return result if result.untyped_storage()._cdata in known else self.device.moved(result)
