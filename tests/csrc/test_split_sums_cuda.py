"""csrc/cuda/split_sums.cuh: the last block to arrive adds up the splits' sums, with the bits of a second launch."""

import ctypes

import pytest
import torch
from support import cases
from support.numerics import assert_product_within_bound, assert_same_bits

from nf4kernels.backends import native

SLOTS = 256  # of counters: csrc/cuda/arrivals.h
SPLITS = 3


@pytest.fixture
def streams(executor_ops):
    """Makes launches come from this stream of the executor's; the slot of counters that it has, or -1."""
    library = executor_ops.executor.library
    library.nf4kernels_executor_stream.argtypes = [ctypes.c_uint64] * 2
    library.nf4kernels_executor_forget_streams()
    yield lambda stream: library.nf4kernels_executor_stream(0, stream)
    library.nf4kernels_executor_forget_streams()


@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_the_last_block_adds_what_a_second_launch_would(executor_ops, streams, op):
    """Of several tiles of the output, the last ones short; whichever block is last; time after time by one counter."""
    library = executor_ops.executor.library
    for stream in range(1, SLOTS + 1):
        assert streams(stream) >= 0
    generator = torch.Generator().manual_seed(0)
    for tile, sizes in enumerate(native.cuda_tiles(library, op)):
        tile_m, tile_n, tile_k = map(int, sizes.split("x"))
        M = tile_m + 3 if tile_m < 128 else 70
        N, K = (tile_n * 2 - 8, tile_k * 4) if op == "linear" else (tile_n * 4, tile_k + 64)
        # As large as the sums, so that the order in which it is added shows.
        qweight, bias = cases.quantized(N, K), (8 * torch.randn(N, generator=generator)).bfloat16()
        matrix = cases.dense(qweight).T if op == "linear" else cases.dense(qweight)
        a = cases.activations(M, len(matrix), torch.bfloat16)
        results = {}
        for stream, schedule in ((1, "ascending"), (1, "descending"), (1, "random"), (SLOTS + 1, "ascending")):
            has_slot = streams(stream) >= 0
            assert has_slot == (stream == 1)
            executor_ops.executor.set(schedule, "late")
            executor_ops.executor.reset()
            with native.running_kernel(library, "tiled", tile, SPLITS):
                y = executor_ops.run(op, a, *qweight.op_args(), *([bias] if op == "linear" else []))
            grids = {launch.kernel.partition("<")[0]: launch.grid for launch in executor_ops.launches()}
            across, down, splits = grids.pop(f"{op}_tiled_kernel")
            assert splits == SPLITS
            assert across * down > 1
            assert list(grids) == ([] if has_slot else ["reduce_splits_kernel"])
            results[stream, schedule] = y
        for how, y in results.items():
            assert_same_bits(y, results[1, "ascending"], f"{op} tile {sizes} {how}")
        assert_product_within_bound(y, a, matrix, f"{op} tile {sizes}", *([bias] if op == "linear" else []))
