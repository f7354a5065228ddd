"""CUDA managed memory for tensors of torch's: its pages move to the host when the device has no room for them."""

import ctypes
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..backends import native, select

ALLOC, FREE = "nf4kernels_cuda_managed_alloc", "nf4kernels_cuda_managed_free"
SEGMENTS = 22 << 20  # bytes: torch's allocator takes memory for small tensors 2 and 20 MiB at a time
GIB = 2**30


class ManagedMemory:
    """Of one device: a pool of torch's allocator, whose memory is managed.

    It lives as long as the process, because torch gives a tensor's memory back through the pool that it is from, and a
    state may outlive its optimizer. What is given back stays in the pool for the next.
    """

    def __init__(self, device: int) -> None:
        library, why_not = select.cuda_library()
        if torch.version.hip is not None:
            library, why_not = None, "the compiled kernels are for NVIDIA's GPUs"
        if library is None:
            raise RuntimeError(
                f"nf4kernels.optim.PagedAdamW: the parameters on cuda:{device} need the compiled CUDA library, and"
                f" there is none: {why_not}"
            )
        self.device, self._library = device, _declared(library.handle)
        if not self._library.nf4kernels_cuda_managed_pages(device):
            raise RuntimeError(
                f"nf4kernels.optim.PagedAdamW: the parameters must be on a GPU whose managed memory moves while it runs"
                f" (concurrentManagedAccess: on Linux, not WSL), and cuda:{device} is none: say torch.optim.AdamW"
            )
        self._allocator = torch.cuda.memory.CUDAPluggableAllocator(str(native.CUDA_LIBRARY), ALLOC, FREE)
        with torch.cuda.device(device):  # a pool is of the device that is current when it is made
            self._pool = torch.cuda.MemPool(self._allocator.allocator())

    def check_room(self, nbytes: int) -> None:
        """torch.OutOfMemoryError unless the device has this much free now, what torch only keeps for later included."""
        kept = sum(segment["total_size"] - segment["allocated_size"] for segment in self._pool.snapshot())
        needed = max(nbytes + SEGMENTS - kept, 0)
        free, whole = torch.cuda.mem_get_info(self.device)
        if needed > free:
            torch.cuda.empty_cache()
            free, whole = torch.cuda.mem_get_info(self.device)
        if needed > free:
            raise torch.OutOfMemoryError(
                f"nf4kernels.optim.PagedAdamW: the state must fit in what cuda:{self.device} has free, and needs"
                f" {_gib(needed)} GiB where {_gib(free)} of {_gib(whole)} are free: train fewer parameters, or have"
                " less there before the first step"
            )

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """What this thread allocates on the device inside a `with` block is managed."""
        with torch.cuda.use_mem_pool(self._pool, self.device):
            yield

    def holds(self, pointer: int) -> bool:
        return self._library.nf4kernels_cuda_managed_holds(pointer)

    def prefetch(self, pointers: Iterable[int]) -> None:
        """Bring what holds these addresses to the device, before what is next on the current stream."""
        asked = list(pointers)
        with torch.cuda.device(self.device):
            if not asked or torch.cuda.is_current_stream_capturing():  # a graph cannot hold a prefetch
                return
            stream = torch.cuda.current_stream(self.device).cuda_stream
            array = (ctypes.c_void_p * len(asked))(*asked)
            wrong = self._library.nf4kernels_cuda_managed_prefetch(array, len(asked), self.device, stream)
        if wrong is not None:
            raise RuntimeError(
                f"nf4kernels.optim.PagedAdamW: cuda:{self.device} cannot prefetch the state: {wrong.decode()}"
            )


@functools.cache
def managed_memory(device: int) -> ManagedMemory:
    """The device's, made when it is first asked for."""
    return ManagedMemory(device)


def _declared(library: Any) -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, arguments, result in (
        ("pages", [number], ctypes.c_bool),
        ("holds", [pointer], ctypes.c_bool),
        ("prefetch", [ctypes.POINTER(pointer), number, number, pointer], ctypes.c_char_p),
    ):
        function = getattr(library, f"nf4kernels_cuda_managed_{name}")
        function.argtypes, function.restype = arguments, result
    return library


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
