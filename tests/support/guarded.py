"""Tensors between two pages that may not be touched, so that one byte read or written outside of one is a SIGSEGV.

Vector code reads past the end of an array without any visible effect, until the array ends at the end of a page.
"""

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE, _PROT_READ, _READ_WRITE = 0, 1, 3
_kept = []  # the mappings live as long as the process


def _protect(address: int, length: int, protection: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(tensor: Tensor, at_end: bool = True, read_only: bool = True) -> Tensor:
    """A copy of a contiguous tensor whose last (or first) byte touches a forbidden page."""
    data = tensor.contiguous()
    pages = max(-(-data.nbytes // PAGE), 1)
    mapping = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offset = PAGE + (pages * PAGE - data.nbytes if at_end else 0)
    count = max(data.numel(), 1)
    copy = torch.frombuffer(mapping, dtype=data.dtype, offset=offset if data.numel() else PAGE, count=count)
    copy = copy[: data.numel()].view(data.shape).copy_(data)
    _protect(address, PAGE, _PROT_NONE)
    _protect(address + (pages + 1) * PAGE, PAGE, _PROT_NONE)
    if read_only:
        _protect(address + PAGE, pages * PAGE, _PROT_READ)
    _kept.append(mapping)
    return copy


def untouched(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which only what is touched takes memory."""
    noreserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype, count=numel)
