"""What the accesses of each CUDA kernel take of shared and global memory, counted by the tests' host executor.

    python -m benchmarks.gpu.accesses               the kernels, each at a shape that is typical of it
    python -m benchmarks.gpu.accesses linear_small  those whose name has this in it

A row is a line of a kernel: how often a warp executes it, and the wavefronts (of shared memory) or sectors of 32 bytes
(of global memory) that it needs at least and that it takes. The widths are those of the source, of which nvcc may join
neighbours; csrc/cuda/*.cu is compiled for the executor first, some minutes the first time. No GPU is needed. Left out
are launches that follow another one (the sums over splits) and what dequantize + GEMM copies.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.model.report import table as aligned

TESTS = Path(__file__).parents[2] / "tests"  # the host executor is theirs
N, K, RANK, EXPERTS = 128, 1024, 16, 4
HEADER = ("kernel", "line", "access", "bytes", "by a warp", "ideal", "actual", "times")


def calls(ops) -> Iterator[tuple[str, str, tuple]]:
    """(op, the kernel that is forced, its arguments): each kernel in bf16, whole tiles and a few of them."""
    weight = nf4.quantize(torch.randn(N, K).bfloat16()).op_args()
    experts = nf4.quantize_experts(torch.randn(EXPERTS, N, K).bfloat16()).op_args()
    code = nf4.quantize(torch.randn(N, K)).code
    yield "quantize", "", (torch.randn(N, K).bfloat16(), code, 64)
    yield "quantize", "", (torch.randn(N, K).bfloat16(), code, 16)
    yield "quantize_absmax", "", (torch.rand(64, 64), weight[5], True)
    yield "dequantize", "", (*weight, 0, N, 0, K, torch.bfloat16)
    B, A = torch.randn(N, RANK).bfloat16(), torch.randn(RANK, K).bfloat16()
    for kernel, M in (
        ("small", 16),
        ("tiled", 32),
        ("tiled", 64),
        ("tiled", 128),
        ("any", 16),
        ("dequantize_gemm", 16),
    ):
        x, P = torch.randn(M, K).bfloat16(), torch.randn(M, RANK).bfloat16()
        yield "linear", kernel, (x, *weight, None, P, B, 2.0)
    for kernel, M in (("tiled", 16), ("tiled", 64), ("tiled", 128), ("any", 16)):
        dy, Q = torch.randn(M, N).bfloat16(), torch.randn(M, RANK).bfloat16()
        yield "linear_dgrad", kernel, (dy, *weight, Q, A, 2.0)
    M = 64
    x, dy, P = (torch.randn(M, width).bfloat16() for width in (K, N, RANK))
    ends = torch.tensor([16, 32, 48, 60], dtype=torch.int32)
    yield "lora_grad", "", (P, x, 2.0, torch.float32)
    yield "lora_grad", "", (P.float(), x.float(), 2.0, torch.float32)
    for kernel in ("small", "tiled", "dequantize_gemm", "any"):
        yield "grouped_linear", kernel, (x, ends, *experts)
    for kernel in ("tiled", "any"):
        yield "grouped_linear_dgrad", kernel, (dy, ends, *experts)
    yield "grouped_lora_inner", "", (x, ends, torch.randn(EXPERTS, RANK, K).bfloat16())
    yield "grouped_lora_inner", "", (dy, ends, torch.randn(EXPERTS, N, RANK).bfloat16(), True)
    yield "grouped_lora_grad", "", (P, x, ends, 2.0, torch.float32)
    tokens, rows, weights = torch.randn(M, K).bfloat16(), torch.randn(2 * M, K).bfloat16(), torch.rand(M, 2)
    index = torch.randint(0, EXPERTS, (M, 2))
    positions = reference.expert_positions(index, EXPERTS)[1]
    yield "sort_by_expert", "", (tokens, index, EXPERTS)
    yield "combine_experts", "", (rows, positions, weights, torch.bfloat16)
    yield "combine_experts_dgrad", "", (tokens, positions, weights, torch.bfloat16)
    yield "combine_experts_wgrad", "", (tokens, rows, positions, torch.float32)


def count(name: str = "") -> list[tuple]:
    """The rows of the kernels whose name has `name` in it."""
    sys.path.insert(0, str(TESTS))
    from support import cuda_backend

    from nf4kernels.backends import native

    executor = cuda_backend.load(races=True)
    executor.library.nf4kernels_executor_device(90, 4)
    ops = getattr(torch.ops, cuda_backend.NAMESPACE)
    with executor.counting():
        for op, kernel, arguments in calls(ops):
            with native.running_kernel(executor.library, kernel) if kernel else nullcontext():
                getattr(ops, op)(*arguments)
    return [row for row in executor.accesses() if name in row.kernel]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", nargs="?", default="", help="a part of the kernels' names")
    rows = count(parser.parse_args().kernel)
    cells = [tuple(map(str, (*row, f"{row.actual / row.ideal:.2f}"))) for row in rows]
    print(aligned([HEADER, *cells]))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
