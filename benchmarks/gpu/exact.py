"""Every kernel, tile and split of every product against fp64, and twice with the same bits.

    python -m benchmarks.gpu.exact

Each tile of a tiled kernel runs at every M, so with rows to spare, with one tile full and with several; the contraction
is so long that each stage of its pipeline is filled again. A split that a kernel cannot have is refused, and said so.
Every row has the bound of docs/design.md, section 7. All that is allocated is NaN at first, so that an element which no
kernel wrote shows, instead of what a result before left there.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Without it torch refuses cuBLAS while its algorithms are to be deterministic, as they are for `poisoned_memory`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor
from torch.utils import deterministic

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.backends import native

from . import sides
from .records import OK, REFUSED, WRONG, Records
from .reuse import REFUSAL, Forced

SHAPES = ((1000, 1408), (2048, 4096))  # [N, K]
ROWS = (5, 13, 40, 130)  # small has tiles of 8 and of 16
SPLITS = (0, 1, 2, 3, 8)  # of tiled; 0: as chosen
CODEBOOKS = ("nf4", "mxfp4")  # whose sums are scaled, and whose levels are
DTYPES = (torch.bfloat16, torch.float16)
EXPERTS, RANK, SCALING = 3, 16, 2.0
OPS = ("linear", "linear_dgrad", "grouped_linear", "grouped_linear_dgrad")
Tiles = Mapping[str, Sequence[str]]  # of each op without "grouped_", as `native.cuda_tiles` names them


def name_of(forced: Forced) -> str:
    tile = f" tile {forced.tile}" if forced.tile >= 0 else ""
    return f"{forced.kernel}{tile}" + (f" {forced.splits} splits" if forced.splits else "")


def ways(op: str, tiles: Tiles, splits: Sequence[int] = SPLITS) -> Iterator[Forced]:
    """Every kernel that an op can be forced to, in each tile and split; small and experts are split by no one else."""
    is_grouped = op.startswith("grouped_")
    yield from map(Forced, ("any", "dequantize_gemm"))
    splits = (0,) if is_grouped else splits
    if not op.endswith("dgrad"):
        yield Forced("small")
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

    @cached_property
    def bounds(self) -> list[tuple[slice, Tensor, Tensor]]:
        """Rows, their fp64 product, and the norm of the error that each of them may have."""
        return [(rows, *row_bounds(self.input[rows], matrix, added)) for rows, matrix, added in self.parts]

    def check(self, result: Tensor) -> None:
        assert not result.isnan().any(), f"{self.what}: NaN"
        for rows, exact, allowed in self.bounds:
            error = (result[rows].double() - exact).norm(dim=1)
            worst = (error / allowed).argmax()
            assert (error <= allowed).all(), (
                f"{self.what}: row {rows.start + worst} has error {error[worst]:.3g} against the fp64 product, allowed "
                f"{allowed[worst]:.3g}; {(error > allowed).sum()} of {len(error)} rows"
            )


def row_bounds(a: Tensor, matrix: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """(a @ matrix + added in fp64, the norm of the error that each row may have): docs/design.md, section 7."""
    depth, columns = matrix.shape
    product, magnitude = a.double() @ matrix.double(), a.double().abs() @ matrix.double().abs()
    dense_error = ((a @ matrix.to(a.dtype)).double() - product).norm(dim=1)
    exact = product + added
    rounding = 1.5 * torch.finfo(a.dtype).eps / columns**0.5 * exact.norm(dim=1)
    return exact, 2 * dense_error + rounding + 2.0**-22 * magnitude.norm(dim=1) / depth**0.5


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """All that torch allocates inside a `with` block is NaN at first, integers all ones."""
    before = torch.are_deterministic_algorithms_enabled()
    assert deterministic.fill_uninitialized_memory, "torch's default changed: memory would not be filled"
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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
                with poisoned_memory(), force(*forced):
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
