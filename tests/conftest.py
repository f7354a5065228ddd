"""What surrounds every test: poisoned allocations, a seed, and the ways to run an op.

Poison: while a test runs, every allocation by torch, in Python or C++, is filled with NaN (integers: all ones), so that
an element which no kernel wrote shows every time. A kernel's own malloc is poisoned in `test_memory.py`.
"""

import contextlib
import dataclasses
import logging
import os
import platform
import shutil

# Read when torch loads OpenMP. Threads that spin while they wait make a test 200 times slower on a loaded machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without it torch refuses cuBLAS while its algorithms are to be deterministic, as they are in every test.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# No test reads or writes what was measured on this machine, unless it says where.
os.environ["NF4KERNELS_CACHE"] = ""

import hypothesis
import pytest
import torch
from executor.executor import SM_86_SHARED
from support import cases, cuda_backend, triton_backend, ways

from nf4kernels.backends import native
from nf4kernels.backends.info import backend_info

pytest.register_assert_rewrite("contract.product", "support.experts")

# Read where a Triton kernel, also of Triton's own library, is defined: without a GPU they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run and machine; `--hypothesis-profile=explore` draws new ones. The isa fixture stays the
# same over all examples of a test, which is what the suppressed check warns about.
_ISA_IS_CONSTANT = [hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile(
    "committed", deadline=None, derandomize=True, database=None, suppress_health_check=_ISA_IS_CONSTANT
)
hypothesis.settings.register_profile(
    "explore", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=_ISA_IS_CONSTANT
)
hypothesis.settings.load_profile("committed")


@pytest.fixture(autouse=True)
def poisoned_allocations():
    assert torch.utils.deterministic.fill_uninitialized_memory, "torch's default changed: the poison would be off"
    torch.use_deterministic_algorithms(True)
    # torch's trace log, thousands of lines a compiled test, would bury the report of a failure.
    logging.getLogger("torch.__trace").propagate = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded_and_threads_restored():
    threads = torch.get_num_threads()
    torch.manual_seed(42)
    yield
    torch.set_num_threads(threads)


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):  # the workers share the cores; a test that is about threads sets its own
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """`way` once for every way of the test's kinds, and for every kernel of its class's op if the test says so."""
    if "way" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("ways")
        every_kernel = metafunc.definition.get_closest_marker("every_kernel") is not None
        chosen = ways.params(getattr(metafunc.cls, "op", ""), marker.args if marker else (), every_kernel)
        marks = {name: pytest.mark.gpu if name in ways.GPU else () for name, _ in chosen}
        metafunc.parametrize(
            "way",
            [pytest.param(each, id="-".join(filter(None, each)), marks=marks[each[0]]) for each in chosen],
            indirect=True,
        )


@pytest.fixture
def way(request):
    """One way to run the ops, its kernel forced and proven to be the one that ran; see `support/ways.py`."""
    name, kernel = request.param
    if ways.kind(name) in ("cpu", "reference"):
        with ways.cpu_way(name, kernel) as cpu_way:
            yield cpu_way
            cpu_way.assert_nothing_else_ran(getattr(request.cls, "op", ""))
        return
    fixtures = {"executor": "executor_ops", "cuda": "gpu", "interpreter": "interpreter", "triton": "triton_gpu"}
    way = request.getfixturevalue(fixtures[name])
    with way.running(kernel) if kernel else contextlib.nullcontext():
        way = dataclasses.replace(way, kernel=kernel)
        yield way
        way.assert_nothing_else_ran(getattr(request.cls, "op", ""))


@pytest.fixture(params=cases.IMPLEMENTATIONS)
def isa(request):
    """Runs a test of what is above the ops at each instruction set that this machine has, forced.

    `test_backends.py` reports each instruction set that is missing as a skip, once, by name.
    """
    with ways.cpu_way(request.param):
        yield request.param


@pytest.fixture
def native_library():
    """The CPU library, for a test that means nothing without it."""
    if cases.LIBRARY is None:
        pytest.skip("needs the native library, and nf4kernels/_cpu.abi3.so was not built")
    return cases.LIBRARY


@pytest.fixture(scope="session")
def executor():
    if platform.machine() != "x86_64" or shutil.which(cuda_backend.build.CXX) is None:
        pytest.skip(f"the host executor needs an x86-64 machine with a C++ compiler ({cuda_backend.build.CXX})")
    variants = {"asan": cuda_backend.ASAN_VARIABLE, "races": cuda_backend.RACES_VARIABLE}
    return cuda_backend.load(**{name: os.environ.get(variable) == "1" for name, variable in variants.items()})


@pytest.fixture
def executor_ops(executor):
    """The CUDA ops on the host executor, for a test that means nothing on a GPU."""
    way = ways.CudaWay("executor", getattr(torch.ops, cuda_backend.NAMESPACE), executor=executor)
    # The smallest shared memory of all architectures: a kernel that needs more would fail on some.
    executor.set(shared_limit=SM_86_SHARED)
    way.pretend(90, 4)
    executor.reset()
    executor.library.nf4kernels_executor_forget_streams()
    yield way
    executor.set()


@pytest.fixture
def gpu():
    """The CUDA ops on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels ran on the host executor only")
    devices = backend_info().devices
    implementation, reason = devices["cuda"]
    if not implementation.startswith("native"):
        pytest.skip(f"no CUDA kernels for this device: {reason}")
    yield ways.CudaWay("cuda", torch.ops.nf4kernels, "cuda")
    torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it


@pytest.fixture
def cuda_library(monkeypatch):
    """The CUDA library that was built, with a driver as new as it needs."""
    if not native.CUDA_LIBRARY.exists():
        pytest.skip("nf4kernels/_cuda.abi3.so was not built: no nvcc?")
    library = native.CudaLibrary(native.CUDA_LIBRARY)
    monkeypatch.setattr(library, "_driver_version", lambda: library.version)
    return library


@pytest.fixture
def interpreter():
    """The Triton ops under Triton's interpreter, for a test that means nothing on a GPU."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device: Triton compiles, and cannot interpret in the same process")
    way = triton_backend.load("cpu")
    way.launched.clear()
    return way


@pytest.fixture
def triton_gpu():
    """The Triton ops on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels ran under Triton's interpreter only")
    yield triton_backend.load("cuda")
    torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it
