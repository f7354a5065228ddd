"""csrc/bindings/arrival_slots.h: launches that may run at once never share a slot of counters."""

import ctypes
import itertools

import pytest
import torch
from support import cases
from support.numerics import assert_same_bits

from nf4kernels.backends import native

SLOTS, CAPTURED = 256, 192


@pytest.fixture
def slot_of(executor_ops):
    library = executor_ops.executor.library
    library.nf4kernels_executor_stream.argtypes = [ctypes.c_uint64] * 2
    library.nf4kernels_executor_forget_streams()
    yield lambda stream, capture=0: library.nf4kernels_executor_stream(capture, stream)
    library.nf4kernels_executor_forget_streams()


def test_streams_and_captures_never_share_a_slot_and_keep_their_own(slot_of):
    keys = list(itertools.product((1, 2, 7, 1 << 40), (0, 1, 2, 1 << 40)))
    slots = [slot_of(*key) for key in keys]
    assert len(set(slots)) == len(keys)
    assert set(slots) <= set(range(SLOTS))
    assert [slot_of(*key) for key in reversed(keys)] == slots[::-1]


def test_a_stream_that_comes_too_late_gets_none(slot_of):
    slots = [slot_of(stream) for stream in range(1, SLOTS + 1)]
    assert sorted(slots) == list(range(SLOTS))
    assert slot_of(SLOTS + 1) == slot_of(5, capture=9) == -1
    assert slot_of(77) == slots[76], "those that came before keep theirs"


def test_graphs_leave_slots_for_streams(slot_of):
    captured = [slot_of(1, capture) for capture in range(1, CAPTURED + 1)]
    assert slot_of(1, capture=CAPTURED + 1) == -1
    streams = [slot_of(stream) for stream in range(1, SLOTS - CAPTURED + 1)]
    assert sorted(captured + streams) == list(range(SLOTS))


def test_a_stream_that_cuda_does_not_tell_gets_none(slot_of, executor_ops):
    """Its sums take a second launch, with the same bits."""
    library = executor_ops.executor.library
    weight, x = cases.quantized(72, 1024), cases.activations(40, 1024, torch.bfloat16)
    results = []
    for is_known in (True, False):
        slot_of(3)
        if not is_known:
            library.nf4kernels_executor_unknown_stream()
        executor_ops.executor.reset()
        with native.running_kernel(library, "tiled", 0, 2):
            results.append(executor_ops.run("linear", x, *weight.op_args(), None))
        names = [launch.kernel.partition("<")[0] for launch in executor_ops.launches()]
        assert names == ["linear_tiled_kernel", *([] if is_known else ["reduce_splits_kernel"])]
    assert_same_bits(*results, "a stream that is not known")


def test_slots_can_be_given_again(slot_of, executor_ops):
    """As a measurement asks for between its graphs, of which there are more than slots."""
    assert [slot_of(7, capture) for capture in range(1, 400)][-1] == -1
    executor_ops.executor.library.nf4kernels_cuda_forget_streams()
    assert [slot_of(7, 400), slot_of(7, 401), slot_of(7)] == [0, 1, 2]
