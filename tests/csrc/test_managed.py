"""The allocator of managed memory, csrc/bindings/cuda_managed.cpp: what it asks of CUDA's runtime, in which order."""

import ctypes
import platform
import shutil

import pytest
from executor.build import CXX
from support import managed

from nf4kernels.optim import managed_memory

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="tests/executor switches fibers in x86-64 assembly"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"tests/executor needs {CXX}"),
]
DEVICE, STREAM = 1, 0x10
# CUDA 13 says a device by a structure of a kind (1 is a device) and a number, and a prefetch has flags.
SIGNATURES = {12080: ("device 1", ""), 13000: ("location 1 1", " flags 0")}


@pytest.fixture(params=SIGNATURES)
def library(request):
    found = managed_memory._declared(managed.load(request.param))
    found.device, found.flags = SIGNATURES[request.param]
    managed.calls(found)
    yield found
    found.nf4_executor_managed_fail(b"")


def allocated(library, nbytes=4096) -> int:
    return library.nf4kernels_cuda_managed_alloc(nbytes, DEVICE, STREAM)


def freed(library, *pointers) -> None:
    for pointer in pointers:
        library.nf4kernels_cuda_managed_free(pointer, 4096, DEVICE, STREAM)


def prefetched(library, *pointers) -> bytes | None:
    array = (ctypes.c_void_p * len(pointers))(*pointers)
    return library.nf4kernels_cuda_managed_prefetch(array, len(pointers), DEVICE, STREAM)


def test_memory_is_managed_and_advised(library):
    pointer = allocated(library)
    device = library.device
    assert managed.calls(library) == [
        f"set_device {DEVICE}", "malloc 4096 1", f"advise 4096 3 {device}", f"advise 4096 5 {device}",
    ]  # fmt: skip
    ctypes.memset(pointer, 1, 4096)
    freed(library, pointer)
    assert managed.calls(library) == ["free"]


def test_what_it_holds(library):
    pointers = [allocated(library), allocated(library, 512)]
    for pointer, nbytes in zip(pointers, (4096, 512)):
        assert library.nf4kernels_cuda_managed_holds(pointer)
        assert library.nf4kernels_cuda_managed_holds(pointer + nbytes - 1)
        assert not library.nf4kernels_cuda_managed_holds(pointer + nbytes)
        assert not library.nf4kernels_cuda_managed_holds(pointer - 1)
    freed(library, pointers[0])
    assert not library.nf4kernels_cuda_managed_holds(pointers[0])
    assert library.nf4kernels_cuda_managed_holds(pointers[1])
    freed(library, pointers[1])
    assert not library.nf4kernels_cuda_managed_holds(pointers[1])


def test_a_prefetch_is_of_whole_allocations_each_once(library):
    large, small = allocated(library), allocated(library, 512)
    managed.calls(library)
    assert prefetched(library, large + 8, large, large + 4095, small + 1) is None
    called = managed.calls(library)
    assert called[0] == f"set_device {DEVICE}"
    assert sorted(called[1:]) == [
        f"prefetch {nbytes} {library.device}{library.flags} stream {STREAM:#x}" for nbytes in (4096, 512)
    ]
    assert prefetched(library) is None
    freed(library, large)
    assert b"no managed memory" in prefetched(library, large)
    freed(library, small)


@pytest.mark.parametrize("failing", ["set_device", "malloc", "advise"])
def test_what_cuda_refuses_is_no_memory_and_leaves_none(library, failing):
    library.nf4_executor_managed_fail(failing.encode())
    assert allocated(library) is None
    called = managed.calls(library)
    assert called.count("free") == (failing == "advise"), "what was allocated is given back"
    assert "get_last_error" in called, "the error would be found by torch's next call"
    pointer = allocated(library)
    assert pointer is not None
    freed(library, pointer)


@pytest.mark.parametrize("failing", ["set_device", "prefetch"])
def test_a_prefetch_that_cuda_refuses_is_told(library, failing):
    pointer = allocated(library)
    library.nf4_executor_managed_fail(failing.encode())
    assert prefetched(library, pointer) is not None
    assert prefetched(library, pointer) is None
    freed(library, pointer)


def test_whether_pages_move(library):
    assert library.nf4kernels_cuda_managed_pages(DEVICE)
    assert managed.calls(library) == [f"attribute {DEVICE}"]
    library.nf4_executor_managed_fail(b"attribute")
    assert not library.nf4kernels_cuda_managed_pages(DEVICE)
