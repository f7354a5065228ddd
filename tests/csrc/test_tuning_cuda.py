"""What a caller forces of CUDA's products, and what was measured on a device in place of what choose.h predicts."""

import pytest
import torch
from support import cases
from support.numerics import assert_product_within_bound

from nf4kernels.backends import native

BF16 = torch.bfloat16


def run(way, op: str, rows: int, N: int = 96, K: int = 640) -> list:
    """The op's launches; the result is right."""
    qweight = cases.quantized(N, K)
    dense = cases.dense(qweight)
    x = cases.activations(rows, K if op == "linear" else N, BF16)
    way.executor.reset()
    arguments = (None,) if op == "linear" else ()
    y = getattr(way.ops, op)(x, *qweight.op_args(), *arguments)
    assert_product_within_bound(y, x, dense.T if op == "linear" else dense, f"{op} {rows} rows")
    return [launch for launch in way.launches() if op in launch.kernel]


def sizes(way, op: str) -> list[tuple[int, int, int]]:
    return [tuple(map(int, tile.split("x"))) for tile in native.cuda_tiles(way.executor.library, op)]


@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_every_tile_and_split_can_be_forced(executor_ops, op):
    library, rows, N, K = executor_ops.executor.library, 9, 96, 640
    tiles = sizes(executor_ops, op)
    assert len(set(tiles)) == len(tiles) >= 3
    for tile, (tile_m, tile_n, tile_k) in enumerate(tiles):
        columns, steps = (-(-N // tile_n), -(-K // tile_k)) if op == "linear" else (-(-K // tile_k), -(-N // tile_n))
        for splits in sorted({1, steps}):
            with native.running_kernel(library, "tiled", tile, splits):
                (launch,) = run(executor_ops, op, rows, N, K)
            assert launch.grid == (columns, -(-rows // tile_m), splits), (launch, tile)
        with (
            native.running_kernel(library, "tiled", tile, steps + 1),
            pytest.raises(RuntimeError, match=r"forced kernel tiled cannot run this: a split would have no step"),
        ):
            run(executor_ops, op, rows, N, K)


def test_what_cannot_be_forced_is_refused(executor_ops):
    library = executor_ops.executor.library
    for forced, why in (
        (("tiled", 6), None),
        (("tiled", -2), None),
        (("small", -1, -1), None),
        (("large",), None),
        (("small", 0), "tiled alone has tiles"),
        (("tiled", 5), "it has fewer tiles"),
        (("dequantize_gemm", -1, 2), "small and tiled alone are split"),
        (("any", -1, 2), "small and tiled alone are split"),
    ):
        if why is None:
            with (
                pytest.raises(ValueError, match="nf4kernels: a CUDA kernel must"),
                native.running_kernel(library, *forced),
            ):
                pass
            continue
        with native.running_kernel(library, *forced), pytest.raises(RuntimeError, match=why):
            run(executor_ops, "linear", 9)
    (launch,) = run(executor_ops, "linear", 9)
    assert "linear_small" in launch.kernel, "the choice is restored"


def test_a_sum_that_is_too_long_is_not_forced(executor_ops):
    library = executor_ops.executor.library
    x, qweight = cases.activations(1, 1 << 18, BF16), cases.quantized(1, (1 << 18) + 64)
    with (
        native.running_kernel(library, "tiled", -1, 1),
        pytest.raises(RuntimeError, match="a sum would be too long without more splits"),
    ):
        executor_ops.ops.linear(torch.cat([x, x[:, :64]], 1), *qweight.op_args(), None)
