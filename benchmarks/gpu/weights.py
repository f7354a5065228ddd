"""Random weights as every side holds them, in so many copies that no L2 holds one side's."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import nf4kernels as nf4
from nf4kernels import reference

from ..harness import rotate
from ..shapes import ExpertsShape
from .sides import bnb
from .timing import Cuda


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
