"""What surrounds every test: poisoned allocations, a seed, and the forced instruction sets.

Poison: while a test runs, every allocation by torch, in Python or C++, is filled with NaN (integers: all ones), so that
an element which no kernel wrote shows every time. A kernel's own malloc is poisoned in `test_memory.py`.
"""

import logging
import os

# Read when torch loads OpenMP. Threads that spin while they wait make a test 200 times slower on a loaded machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cases
import hypothesis
import pytest
import torch

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


@pytest.fixture(params=cases.IMPLEMENTATIONS)
def isa(request):
    """Runs the test at each instruction set that this machine has, forced; without the library at the reference.

    `test_backends.py` reports each instruction set that is missing as a skip, once, by name.
    """
    if request.param == "reference":
        yield request.param
        return
    with cases.LIBRARY.running_isa(request.param):
        assert cases.LIBRARY.isa == request.param
        yield request.param
        assert cases.LIBRARY.isa == request.param, "something changed the instruction set during the test"


@pytest.fixture
def native_library():
    """The CPU library, for a test that means nothing without it."""
    if cases.LIBRARY is None:
        pytest.skip("needs the native library, and nf4kernels/_cpu.abi3.so was not built")
    return cases.LIBRARY
