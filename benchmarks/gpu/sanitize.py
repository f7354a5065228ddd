"""Every op and every CUDA kernel at small shapes, for compute-sanitizer; results are compared with the reference.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize

Two sets: shapes with tails, by every kernel that takes them; and shapes by which every tile of a kernel with a pipeline
fills its stages again, so that racecheck sees a stage that is still read. The tests run the same on the host executor.

The reference runs on the CPU: under the sanitizer each kernel costs a millisecond, torch's own too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.backends import native, select

from .reuse import PIPELINED, REFUSAL, Forced, Reuse, reuses

# [N, K]: whole tiles; tails of both, blocks that straddle rows; an odd K, whose rows share bytes
SHAPES = ((64, 256), (72, 200), (33, 71))
ROWS = {torch.bfloat16: (1, 9, 40), torch.float16: (40,), torch.float32: (40,)}
KERNELS = ("small", "tiled", "dequantize_gemm", "any")
TOLERANCE = 0.02  # of the largest element; the tests hold the kernels to their bounds, here they only must have run
Tiles = Mapping[str, Sequence[str]]  # of each of PIPELINED, as `native.cuda_tiles` names them


class Case(NamedTuple):
    what: str
    op: str
    args: tuple  # on the CPU
    kernels: tuple[Forced | None, ...] = (None,)  # None is the one that the table chooses


def cases(tiles: Tiles, multiprocessors: int) -> Iterator[Case]:
    for N, K in SHAPES:
        for dtype, rows in ROWS.items():
            what = f"{N}x{K} {str(dtype).removeprefix('torch.')}"
            w = torch.randn(N, K).to(dtype)
            qw = nf4.quantize(w, **options(dtype))
            yield Case(what, "quantize", (w, qw.code, 64))
            for bounds in ((0, N, 0, K), (3, N - 1, 5, K - 2)):
                yield Case(f"{what} {bounds}", "dequantize", (*qw.op_args(), *bounds, dtype))
            for M in rows:
                for case in products(f"{what} M={M}", qw.op_args(), N, K, M, dtype):
                    yield case._replace(kernels=(None, *map(Forced, KERNELS))) if "linear" in case.op else case
            yield from routing(what, K, dtype, 7)
    yield from scales()
    yield from routing("experts in two turns", 8, torch.float32, 300)
    yield from splits_of_rows()
    for op in PIPELINED:
        for reuse in reuses(op, tiles[op], multiprocessors):
            yield Case(f"{reuse}", op, product(op, reuse), (reuse.kernel,))


def options(dtype: torch.dtype) -> dict:
    """Of quantize: scales that multiply sums, in fp16 levels."""
    return {"double_quant": dtype == torch.bfloat16, "block_size": 16 if dtype == torch.float16 else 64}


def scales() -> Iterator[Case]:
    """One superblock; and 300, whose sum is rounded, so that it is taken in the format's order, in two turns."""
    generator = torch.Generator().manual_seed(0)
    for blocks, spread, name in ((72, 0, "e4m3"), (300 * 256 - 9, 40, "dynamic8")):
        exponents = torch.randint(-spread, spread + 1, (blocks,), generator=generator)
        absmax = torch.rand(blocks, generator=generator) * 2.0**exponents
        code = nf4.codebook.SCALE_CODEBOOKS[name].clone()
        yield Case(f"{blocks} blocks", "quantize_absmax", (absmax, code, name == "e4m3"))


def splits_of_rows() -> Iterator[Case]:
    """M in parts, which the last block to arrive adds."""
    small, wide = torch.randn(1100, 5).bfloat16(), torch.randn(1100, 64).bfloat16()
    for is_transposed in (False, True):
        yield Case(f"1100 rows, {is_transposed=}", "lora_grad", (small, wide, 2.0, torch.bfloat16, is_transposed))


def routing(what: str, H: int, dtype: torch.dtype, experts: int) -> Iterator[Case]:
    tokens, rows, weights = torch.randn(90, H).to(dtype), torch.randn(270, H).to(dtype), torch.rand(90, 3)
    index = torch.randint(0, experts + 1, (90, 3))  # the last is none
    positions = reference.expert_positions(index, experts)[1]
    yield Case(what, "sort_by_expert", (tokens, index, experts))
    yield Case(what, "combine_experts", (rows, positions, weights, dtype))
    yield Case(what, "combine_experts_dgrad", (tokens, positions, weights, torch.float32))
    yield Case(what, "combine_experts_wgrad", (tokens, rows, positions, torch.float32))


def products(what: str, weight: tuple, N: int, K: int, M: int, dtype: torch.dtype) -> Iterator[Case]:
    shapes = ((M, K), (M, N), (16, K), (N, 16), (M, 16))
    x, dy, A, B, P = (torch.randn(*shape).to(dtype) for shape in shapes)
    yield Case(what, "linear", (x, *weight, None))
    yield Case(f"{what} LoRA", "linear", (x, *weight, None, P, B, 2.0))
    yield Case(what, "linear_dgrad", (dy, *weight))
    yield Case(f"{what} LoRA", "linear_dgrad", (dy, *weight, P, A, 2.0))
    yield Case(what, "lora_grad", (P, x, 2.0, dtype))
    yield Case(f"{what} transposed", "lora_grad", (P, dy, 2.0, dtype, True))
    yield Case(f"{what} rank 5", "lora_grad", (P[:, :5].contiguous(), x, 2.0, dtype))
    if K % 64 == 0:
        experts = nf4.quantize_experts(torch.randn(5, N, K).to(dtype), **options(dtype))
        offsets = torch.tensor([0, M // 3, M // 3, M - 1, M - 1], dtype=torch.int32)  # two have rows
        yield Case(f"{what} experts", "grouped_linear", (x, offsets, *experts.op_args()))
        yield Case(f"{what} experts", "grouped_linear_dgrad", (dy, offsets, *experts.op_args()))
        As, Bs, bias = (torch.randn(5, *shape).to(dtype) for shape in ((16, K), (N, 16), (N,)))
        yield Case(f"{what} experts LoRA", "grouped_linear", (x, offsets, *experts.op_args(), bias, P, Bs, 2.0))
        yield Case(f"{what} experts LoRA", "grouped_linear_dgrad", (dy, offsets, *experts.op_args(), P, As, 2.0))
        yield Case(f"{what} experts", "grouped_lora_inner", (x, offsets, As))
        yield Case(f"{what} experts, transposed", "grouped_lora_inner", (dy, offsets, Bs, True))
        yield Case(f"{what} experts", "grouped_lora_grad", (P, x, offsets, 2.0, dtype))


def product(op: str, reuse: Reuse) -> tuple:
    """The op's arguments."""
    generator = torch.Generator().manual_seed(reuse.M)
    shape = (reuse.M, reuse.N if op.endswith("dgrad") else reuse.K)
    a = torch.randn(shape, generator=generator).to(reuse.dtype)
    experts = 2 if op.startswith("grouped") else 1
    w = torch.randn(experts, reuse.N, reuse.K, generator=generator)
    options = {"double_quant": reuse.scales_sums, "block_size": 64 if reuse.scales_sums else 16}
    if experts == 1:
        return a, *nf4.quantize(w[0], **options).op_args(), *(() if op.endswith("dgrad") else (None,))
    offsets = torch.tensor([reuse.M - 1, reuse.M], dtype=torch.int32)
    return a, offsets, *nf4.quantize_experts(w, **options).op_args()


def is_close(result: Tensor, expected: Tensor) -> bool:
    difference = (result.cpu().double() - expected.double()).abs().max()
    return bool(difference <= TOLERANCE * expected.double().abs().max())  # False for a NaN too


def forcing(force: Callable[..., AbstractContextManager], kernel: Forced | None) -> AbstractContextManager:
    return nullcontext() if kernel is None else force(*kernel)


def main(
    device: str,
    force: Callable[..., AbstractContextManager],
    tiles: Tiles,
    multiprocessors: int,
    ops: object = torch.ops.nf4kernels,
) -> int:
    """How many results were wrong; a forced kernel may refuse a case."""
    torch.zeros(1, device=device)  # fails here, before a word, where the sanitizer refuses the device
    print(f"every op once on {device}", flush=True)
    ran = refused = wrong = 0
    for case in cases(tiles, multiprocessors):
        there = tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, case.args)
        expected = getattr(reference, case.op)(*case.args)
        for kernel in case.kernels:
            try:
                with forcing(force, kernel):
                    result = getattr(ops, case.op)(*there)
            except RuntimeError as error:
                if REFUSAL not in str(error):
                    raise
                refused += 1
                continue
            ran += 1
            pairs = [(result, expected)] if isinstance(result, Tensor) else list(zip(result, expected))
            if not all(is_close(*pair) for pair in pairs):
                wrong += 1
                print(f"WRONG: {case.op} {case.what}, {kernel or 'the chosen kernel'}")
    print(f"{ran} calls, {wrong} wrong, {refused} refused by a forced kernel", flush=True)
    return wrong


if __name__ == "__main__":
    torch.manual_seed(0)
    library, obstacle = select.cuda_library()
    if library is None:
        raise SystemExit(f"no CUDA kernel can be forced: {obstacle}")
    tiles = {op: native.cuda_tiles(library.handle, op) for op in PIPELINED}
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count
    wrong = main("cuda", partial(native.running_kernel, library.handle), tiles, multiprocessors)
    raise SystemExit(1 if wrong else 0)
