"""Every kernel, tile and split of every product against fp64, and twice with the same bits.

    python -m benchmarks.gpu.exact

Each tile of a tiled kernel runs at every M, so with rows to spare, with one tile full and with several; the contraction
is so long that each stage of its pipeline is filled again. A split that a kernel cannot have is refused, and said so.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.backends import native

from ..checks import assert_as_exact_as_dense
from . import sides
from .records import OK, REFUSED, WRONG, Records
from .reuse import REFUSAL, Forced

SHAPES = ((1000, 1408), (2048, 4096))  # [N, K]
ROWS = (5, 40, 130)
SPLITS = (0, 1, 2, 3, 8)  # 0: as chosen
CODEBOOKS = ("nf4", "mxfp4")  # whose sums are scaled, and whose levels are
DTYPES = (torch.bfloat16, torch.float16)
EXPERTS, RANK, SCALING = 3, 16, 2.0
OPS = ("linear", "linear_dgrad", "grouped_linear", "grouped_linear_dgrad")
Tiles = Mapping[str, Sequence[str]]  # of each op without "grouped_", as `native.cuda_tiles` names them


def name_of(forced: Forced) -> str:
    tile = f" tile {forced.tile}" if forced.tile >= 0 else ""
    return f"{forced.kernel}{tile}" + (f" {forced.splits} splits" if forced.splits else "")


def ways(op: str, tiles: Tiles, splits: Sequence[int] = SPLITS) -> Iterator[Forced]:
    """Every kernel that an op can be forced to, in each tile and split; experts are split by no one but the kernel."""
    is_grouped = op.startswith("grouped_")
    yield from map(Forced, ("any", "dequantize_gemm"))
    splits = (0,) if is_grouped else splits
    if not op.endswith("dgrad"):
        yield from (Forced("small", splits=count) for count in splits)
    for tile, count in itertools.product(range(len(tiles[op.removeprefix("grouped_")])), splits):
        yield Forced("tiled", tile, count)


@dataclass(frozen=True)
class Case:
    """A product with a LoRA term, of one weight or of experts."""

    what: str
    op: str
    arguments: tuple
    parts: tuple[tuple[slice, Tensor, Tensor], ...]  # rows, the fp32 matrix that they meet, and what is added, in fp64
    input: Tensor

    def check(self, result: Tensor) -> None:
        assert not result.isnan().any(), f"{self.what}: NaN"
        for rows, matrix, added in self.parts:
            assert_as_exact_as_dense(result[rows], self.input[rows], matrix, self.what, added)


def cases(
    device: str, shapes: Sequence = SHAPES, rows: Sequence[int] = ROWS, codebooks: Sequence[str] = CODEBOOKS
) -> Iterator[Case]:
    for (N, K), codebook, dtype in itertools.product(shapes, codebooks, DTYPES):
        experts = nf4.quantize_experts(torch.randn(EXPERTS, N, K).mul_(0.02).to(dtype), codebook=codebook)
        experts = experts.to(device)
        decoded = [_decoded(experts[e], N, K) for e in range(EXPERTS)]
        for op, M in itertools.product(OPS, rows):
            what = f"{op} {codebook} {str(dtype).removeprefix('torch.')} {N}x{K} M={M}"
            yield case(what, op, experts, decoded, M, dtype, device)


def _decoded(q, N: int, K: int) -> Tensor:
    return reference.dequantize(*q.op_args(), 0, N, 0, K, torch.float32)


def case(what: str, op: str, experts, decoded: list[Tensor], M: int, dtype: torch.dtype, device: str) -> Case:
    is_dgrad, is_grouped = op.endswith("dgrad"), op.startswith("grouped_")
    N, K = decoded[0].shape
    depth, width = (N, K) if is_dgrad else (K, N)
    new = {"dtype": dtype, "device": device}
    a, inner = torch.randn(M, depth, **new), torch.randn(M, RANK, **new)
    factor = torch.randn(EXPERTS, *((RANK, width) if is_dgrad else (width, RANK)), **new).mul_(0.05)
    ends = [M // 4, M // 4, M] if is_grouped else [M, M, M]  # the second expert has no rows
    begins = [0, *ends[:-1]]
    parts = []
    for e in range(EXPERTS if is_grouped else 1):
        if begins[e] < ends[e]:
            rows = slice(begins[e], ends[e])
            by = factor[e].double() if is_dgrad else factor[e].double().T
            parts.append((rows, decoded[e] if is_dgrad else decoded[e].T, SCALING * inner[rows].double() @ by))
    bias = () if is_dgrad else (None,)
    if is_grouped:
        offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        arguments = (a, offsets, *experts.op_args(), *bias, inner, factor, SCALING)
    else:
        arguments = (a, *experts[0].op_args(), *bias, inner, factor[0], SCALING)
    return Case(what, op, arguments, tuple(parts), a)


def check(
    ops, tiles: Tiles, force: Callable[..., AbstractContextManager], records: Records, some: Iterator[Case],
    splits: Sequence[int] = SPLITS, has_time: Callable[[], bool] = lambda: True,
) -> None:  # fmt: skip
    """Runs each case by each kernel, tile and split, and records what came."""
    for one in some:
        if not has_time():
            records.add(one.what, REFUSED, "no time was left for it and what follows")
            return
        for forced in ways(one.op, tiles, splits):
            what = f"{one.what}, {name_of(forced)}"
            try:
                with force(*forced):
                    first, again = (getattr(ops, one.op)(*one.arguments) for _ in range(2))
            except RuntimeError as error:
                refuses = REFUSAL in str(error)
                records.add(what, REFUSED if refuses else WRONG, str(error).splitlines()[0][-120:])
                if not refuses:
                    raise  # an error of CUDA stays with the process
                continue
            try:
                one.check(first)
                assert torch.equal(first, again), "a second run gave other bits"
            except AssertionError as error:
                records.add(what, WRONG, str(error).splitlines()[0])
            else:
                records.add(what, OK)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.exact", description=__doc__)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="in all (default: %(default)s)")
    args = parser.parse_args()
    deadline = time.perf_counter() + args.seconds
    torch.manual_seed(0)
    tiles = {op: native.cuda_tiles(sides.cuda_library().handle, op) for op in OPS[:2]}
    records = Records("exact", args.records)
    check(torch.ops.nf4kernels, tiles, sides.forcing(), records, cases("cuda"),
          has_time=lambda: time.perf_counter() < deadline)  # fmt: skip
    print(f"against fp64, and a second time: {records}", flush=True)
    raise SystemExit(1 if records.wrong else 0)


if __name__ == "__main__":
    main()
