"""What a launch must do: weights decoded, bytes moved, multiply-adds; of our kernels and of bitsandbytes'."""

import re

from .cards import Card
from .cuda_report import Kernel
from .kernel_time import Work
from .launches import Launch, Plan, Product

WEIGHT_BYTES = 0.516  # NF4, block size 64, double-quantized
MMA_M = 8  # rows of x in one mma
FRAGMENT_WEIGHTS = 8  # a lane
# Of shared memory: the pair table of the tiled kernels, and the most of linear_small's, which may hold little else.
TABLE_BYTES, SMALL_TABLE_BYTES = 32 << 10, 64 << 10


def product_work(kernel: Kernel, plan: Plan, launch: Launch, product: Product) -> Work:
    """Of a fused product, or of the sum over its splits: every m tile decodes all weights."""
    N, K, M = product.N, product.K, product.M
    width, depth = (K, N) if product.op == "linear_dgrad" else (N, K)
    of_product = next(other for other in plan.launches if is_product(other))
    tile_rows, tile_columns = plan.tile
    m_tiles, n_tiles = -(-M // tile_rows), -(-width // tile_columns)
    sums = split_sums(of_product, tile_rows * m_tiles, tile_columns, n_tiles, product)
    is_added_here = bool(sums) and len(plan.launches) == 1
    if launch is not of_product:
        return Work(0, 0, 4 * sums + 2 * M * width)
    weight, x, y = WEIGHT_BYTES * N * K, 2 * M * depth, 2 * M * width
    at_once = MMA_M * max(1, round(kernel.loop_counts["HMMA"] * FRAGMENT_WEIGHTS / kernel.weights))
    is_small = product.kernel == "small"
    rows = at_once if is_small else tile_rows * m_tiles
    return Work(
        passages=N * K * rows / at_once,
        nbytes=weight + x + y,
        l2_bytes=weight * m_tiles + x * n_tiles + (8 * sums + y if is_added_here else 4 * sums or y),
        multiply_adds=N * K * rows,
        table_bytes=min(launch.shared, SMALL_TABLE_BYTES) if is_small else TABLE_BYTES,
        is_split=is_added_here,
        passes_ahead=2 if "LDGSTS" in kernel.loop_counts else 1,
    )


def split_sums(launch: Launch, rows: int, tile_columns: int, n_tiles: int, product: Product) -> int:
    """How many fp32 sums the product's blocks leave in the L2, as the library makes room for them; 0 if unsplit.

    `rows` are those of all m tiles. Of small, some of whose blocks share a tile where the tiles cannot be dealt out
    whole, two tiles a block; of tiled all tiles in each split.
    """
    if product.kernel == "small":
        return 2 * launch.blocks * product.M * tile_columns if n_tiles % launch.blocks else 0
    splits = launch.grid[2]
    return rows * tile_columns * n_tiles * splits if splits > 1 else 0


def is_product(launch: Launch) -> bool:
    """Else it adds splits up."""
    return launch.kernel.startswith("linear") and "_join_" not in launch.kernel


def dequantize_work(card: Card, weights: float) -> Work:
    """Of a slice, which stays in the L2 where that has room for it beside what streams through."""
    written = 2 * weights
    nbytes = WEIGHT_BYTES * weights + (0 if written < card.l2_mb * 1e6 else 2 * written)
    return Work(weights, nbytes, WEIGHT_BYTES * weights + written, passes_ahead=0)


def bitsandbytes_work(card: Card, launch: Launch, N: int, K: int, M: int) -> Work:
    """Of its fused kernels: a pass of the main loop asks for weights and waits for them."""
    weight, x, y = WEIGHT_BYTES * N * K, 2 * M * K, 2 * M * N
    tile = re.search(r"sm80_m16n8k16<__nv_bfloat16, (\d+)", launch.kernel)
    if tile is None:  # x stays in the L1
        return Work(N * K * launch.grid[1], weight + x + y, weight * launch.grid[1] + x * card.sms + y, passes_ahead=0)
    rows = int(tile[1])
    m_tiles, n_tiles = launch.grid[0], launch.grid[1]
    return Work(
        N * K * m_tiles, weight + x + y, weight * m_tiles + x * n_tiles + y, N * K * m_tiles * rows, passes_ahead=0
    )
