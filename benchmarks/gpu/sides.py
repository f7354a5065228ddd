"""Who is measured on a GPU: ours, each kernel forced, Triton's, bitsandbytes'; and a weight as each side holds it."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.backends import native, select

from ..harness import BNB_DQ, Row, rotate
from ..shapes import ExpertsShape
from .device import Cuda

try:
    import bitsandbytes as bnb

    BNB_MISSING = None
except ImportError as error:
    bnb, BNB_MISSING = None, f"bitsandbytes is not measured: {error}"

try:
    from nf4kernels.backends import triton as triton_backend

    TRITON_MISSING = None
except ImportError as error:
    triton_backend, TRITON_MISSING = None, f"our Triton kernels are not measured: {error}"

Sides = dict[str, Callable[[], object]]
TRITON = "triton"  # our own kernels in Triton
FORCED = "kernel "
# The kernels that can be forced, and the largest M where each is worth its time: `any` is the plain one.
KERNELS = {"small": 16, "tiled": math.inf, "panel": math.inf, "any": 64}


def forcing() -> Callable[[str], AbstractContextManager]:
    """`native.running_kernel` of the CUDA library that runs here."""
    library, obstacle = select.cuda_library()
    if library is None:
        raise SystemExit(f"no CUDA kernel can be forced: {obstacle}")
    return partial(native.running_kernel, library.handle)


def forced_sides(op: str, M: int) -> list[str]:
    """The kernels that run `op` and are worth their time at M rows; `small` is linear's alone."""
    return [
        FORCED + kernel for kernel, most in KERNELS.items() if most >= M and (op, kernel) != ("linear_dgrad", "small")
    ]


def forced_ms(row: Row) -> dict[str, float]:
    """kernel -> its time in this row."""
    return {side.removeprefix(FORCED): ms for side, ms in row.ms.items() if side.startswith(FORCED)}


def triton_side(run: Callable[[Mapping[str, Callable]], object]) -> Sides:
    """The side that `run` is with Triton's functions by op; none without Triton."""
    return {} if triton_backend is None else {TRITON: torch.no_grad()(lambda: run(triton_backend.OPS))}


def bitsandbytes_side(run: Callable[[], object]) -> Sides:
    """The side that `run` is; none without bitsandbytes."""
    return {} if bnb is None else {BNB_DQ: run}


def bitsandbytes_linear(x: Tensor, packed: Tensor, state) -> Tensor:
    return bnb.matmul_4bit(x, packed.t(), quant_state=state)


def bitsandbytes_dgrad(dy: Tensor, packed: Tensor, state) -> Tensor:
    """What its autograd does."""
    return dy @ bnb.functional.dequantize_4bit(packed, state)


class Weights:
    """One random weight as every side holds it, in so many copies that the L2 cannot hold one side's."""

    def __init__(self, shape: tuple[int, int], machine: Cuda) -> None:
        self.shape = shape
        dense = torch.randn(*shape, device=machine.device).mul_(0.02).bfloat16()
        self.qweight = nf4.quantize(dense)
        self.nbytes = sum(t.nbytes for t in (self.qweight.packed, self.qweight.absmax))
        self.copies = max(2, -(-3 * machine.cache_bytes // self.nbytes))
        self.decoded = reference.dequantize(*self.qweight.op_args(), 0, shape[0], 0, shape[1], torch.float32)
        self.dense = [dense.clone() for _ in range(max(2, -(-3 * machine.cache_bytes // dense.nbytes)))]
        q = self.qweight
        self.ours = [replace(q, packed=q.packed.clone(), absmax=q.absmax.clone()) for _ in range(self.copies)]
        self.bnb = []
        if bnb is not None:
            packed, state = bnb.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
            self.bnb = [(packed.clone(), state) for _ in range(self.copies)]

    def in_turn(self) -> tuple[Callable, Callable, Callable]:
        """Functions that return our, the dense and bitsandbytes' copies in turn."""
        return rotate(self.ours), rotate(self.dense), rotate(self.bnb)


class ExpertWeights:
    """The random weights of experts as every side holds them, twice: one side's is more than an L2 holds."""

    def __init__(self, shape: ExpertsShape, machine: Cuda) -> None:
        self.shape = shape
        dense = torch.randn(shape.experts, shape.N, shape.K, device=machine.device, dtype=torch.bfloat16).mul_(0.02)
        first = nf4.quantize_experts(dense)
        self.nbytes = (first.packed.nbytes + first.absmax.nbytes) // len(first)  # of an expert
        self.ours = [first, replace(first, packed=first.packed.clone(), absmax=first.absmax.clone())]
        self.dense = [dense, dense.clone()]
        self.bnb = []
        if bnb is not None:
            self.bnb = [bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in dense]

    def decoded(self, expert: int) -> Tensor:
        q = self.ours[0][expert]
        return reference.dequantize(*q.op_args(), 0, self.shape.N, 0, self.shape.K, torch.float32)
