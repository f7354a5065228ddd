"""Every op and every CUDA kernel once, at small shapes, for compute-sanitizer; results are compared with the reference.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize

The reference runs on the CPU: under the sanitizer each kernel costs a millisecond, torch's own too.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import nf4kernels as nf4
from nf4kernels import reference

from . import sides
from .timing import REFUSAL

# [N, K]: whole tiles; tails of both, blocks that straddle rows; an odd K, whose rows share bytes
SHAPES = ((64, 256), (72, 200), (33, 71))
ROWS = (1, 9, 40)
KERNELS = (None, *sides.KERNELS)  # None is the one that the table chooses
TOLERANCE = 0.02  # of the largest element; the tests hold the kernels to their bounds, here they only must have run
Case = tuple[str, str, tuple]


def cases() -> Iterator[Case]:
    """(what it is, the op's name, its arguments on the CPU)"""
    for N, K in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            what = f"{N}x{K} {str(dtype).removeprefix('torch.')}"
            w = torch.randn(N, K).to(dtype)
            qw = nf4.quantize(w, double_quant=dtype != torch.float32)
            yield what, "quantize", (w, qw.code, 64)
            if qw.scale_code is not None:
                absmax = reference.quantize(w, qw.code, 64)[1]
                yield what, "quantize_absmax", (absmax, qw.scale_code, True)
            for bounds in ((0, N, 0, K), (3, N - 1, 5, K - 2)):
                yield f"{what} {bounds}", "dequantize", (*qw.op_args(), *bounds, dtype)
            for M in ROWS:
                yield from products(f"{what} M={M}", qw.op_args(), N, K, M, dtype)
            yield from routing(what, K, dtype)


def routing(what: str, H: int, dtype: torch.dtype) -> Iterator[Case]:
    tokens, rows, weights = torch.randn(90, H).to(dtype), torch.randn(270, H).to(dtype), torch.rand(90, 3)
    index = torch.randint(0, 8, (90, 3))  # 7 is none
    positions = reference.expert_positions(index, 7)[1]
    yield what, "sort_by_expert", (tokens, index, 7)
    yield what, "combine_experts", (rows, positions, weights, dtype)
    yield what, "combine_experts_dgrad", (tokens, positions, weights, torch.float32)
    yield what, "combine_experts_wgrad", (tokens, rows, positions, torch.float32)


def products(what: str, weight: tuple, N: int, K: int, M: int, dtype: torch.dtype) -> Iterator[Case]:
    shapes = ((M, K), (M, N), (16, K), (N, 16), (M, 16))
    x, dy, A, B, P = (torch.randn(*shape).to(dtype) for shape in shapes)
    yield what, "linear", (x, *weight, None)
    yield f"{what} LoRA", "linear", (x, *weight, None, P, B, 2.0)
    yield what, "linear_dgrad", (dy, *weight)
    yield f"{what} LoRA", "linear_dgrad", (dy, *weight, P, A, 2.0)
    yield what, "lora_grad", (P, x, 2.0, dtype)
    if K % 64 == 0:
        experts = nf4.quantize_experts(torch.randn(5, N, K).to(dtype), double_quant=dtype != torch.float32)
        offsets = torch.tensor([0, M // 3, M // 3, M - 1, M - 1], dtype=torch.int32)  # two have rows
        yield f"{what} experts", "grouped_linear", (x, offsets, *experts.op_args())
        yield f"{what} experts", "grouped_linear_dgrad", (dy, offsets, *experts.op_args())
        As, Bs, bias = (torch.randn(5, *shape).to(dtype) for shape in ((16, K), (N, 16), (N,)))
        yield f"{what} experts LoRA", "grouped_linear", (x, offsets, *experts.op_args(), bias, P, Bs, 2.0)
        yield f"{what} experts LoRA", "grouped_linear_dgrad", (dy, offsets, *experts.op_args(), P, As, 2.0)
        yield f"{what} experts", "grouped_lora_inner", (x, offsets, As)
        yield f"{what} experts, transposed", "grouped_lora_inner", (dy, offsets, Bs, True)
        yield f"{what} experts", "grouped_lora_grad", (P, x, offsets, 2.0, dtype)


def is_close(result: Tensor, expected: Tensor) -> bool:
    difference = (result.cpu().double() - expected.double()).abs().max()
    return bool(difference <= TOLERANCE * expected.double().abs().max())  # False for a NaN too


def main(device: str, force: Callable[[str], AbstractContextManager], ops=torch.ops.nf4kernels) -> int:
    """How many results were wrong; a forced kernel may refuse a case."""
    torch.zeros(1, device=device)  # fails here, before a word, where the sanitizer refuses the device
    print(f"every op once on {device}", flush=True)
    ran = refused = wrong = 0
    for what, op, args in cases():
        there = tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, args)
        expected = getattr(reference, op)(*args)
        for kernel in KERNELS if "linear" in op else (None,):
            try:
                with force(kernel) if kernel else nullcontext():
                    result = getattr(ops, op)(*there)
            except RuntimeError as error:
                if REFUSAL not in str(error):
                    raise
                refused += 1
                continue
            ran += 1
            pairs = [(result, expected)] if isinstance(result, Tensor) else list(zip(result, expected))
            if not all(is_close(*pair) for pair in pairs):
                wrong += 1
                print(f"WRONG: {op} {what}, {kernel or 'the chosen'} kernel")
    print(f"{ran} calls, {wrong} wrong, {refused} refused by a forced kernel", flush=True)
    return wrong


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(1 if main("cuda", sides.forcing()) else 0)
