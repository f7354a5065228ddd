"""Products by which every block of a kernel with a pipeline of stages fills each stage again.

A shape of as many steps as there are stages fills each once, and then a fetch that does not wait until a stage has been
read does no harm.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

REFUSAL = "cannot run this"  # a forced kernel says so of a shape, a dtype or an alignment
STEPS = 6  # at least two more than there are stages, as the tests on the host executor count
SMALL_K = 5120  # STEPS - 1 for each of eight warps that take turns at 128
PIPELINED = ("linear", "linear_dgrad", "grouped_linear", "grouped_linear_dgrad")


class Forced(NamedTuple):
    """The arguments of `native.running_kernel`."""

    kernel: str
    tile: int = -1
    splits: int = 0


class Reuse(NamedTuple):
    """A product whose every block fills a stage again, STEPS of them for each split of the contraction."""

    kernel: Forced
    M: int
    N: int
    K: int
    scales_sums: bool  # or levels: csrc/cuda/product.cuh
    dtype: torch.dtype


def reuses(op: str, tiles: Sequence[str], multiprocessors: int = 1) -> Iterator[Reuse]:
    """Every tile in both forms of scales, unsplit in bf16 and in two parts in fp16.

    The last tile's rows are one tile and two more. The small kernel, which shares its work out to all multiprocessors,
    has tiles of 8 and 16 rows.
    """
    if op == "linear":
        for M, dtype, scales_sums in itertools.product((5, 9), (torch.bfloat16, torch.float16), (True, False)):
            yield Reuse(Forced("small"), M, 64 * multiprocessors + 8, SMALL_K, scales_sums, dtype)
    for i, tile in enumerate(tiles):
        m, n, k = map(int, tile.split("x"))
        M = m + 2 if i + 1 == len(tiles) else m // 2 + 1
        for splits, dtype in ((1, torch.bfloat16), (2, torch.float16)):
            depth = splits * STEPS
            N, K = (depth * n, max(k - 64, 64)) if op.endswith("dgrad") else (n - 23, depth * k)
            for scales_sums in (True, False):
                yield Reuse(Forced("tiled", i, splits), M, N, K, scales_sums, dtype)
