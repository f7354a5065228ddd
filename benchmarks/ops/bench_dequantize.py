"""dequantize NF4 with double quantization -> bf16: into an `out` that is there already, and into fresh memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import nf4kernels as nf4
from nf4kernels import reference

from ..harness import BNB, BNB_DQ, OURS, Plan, Row, rotate
from ..limits import Limits
from ..peers import Layers, bnb

COPY, CLONE = "copy_ of bf16", "clone of bf16"


def bitsandbytes_dequantize(layer: torch.nn.Module, copies: int) -> Callable[[], torch.Tensor]:
    """Over so many copies of the packed weight; bitsandbytes has no `out` on the CPU."""
    state = layer.weight.quant_state
    packed = rotate([layer.weight.data.clone() for _ in range(copies)])
    return lambda: bnb.functional.dequantize_4bit(packed(), state)


def rows(layers: Layers, limits: Limits, plan: Plan) -> Iterator[Row]:
    qw, dense = layers.qweight, layers.dense_weight
    N, K = layers.shape
    truth = reference.dequantize(*qw.op_args(), 0, N, 0, K, torch.bfloat16)
    into = torch.empty_like(dense)
    nf4.dequantize(qw, out=into)
    assert torch.equal(into, truth), "dequantize into out must give the reference's bits"
    assert torch.equal(nf4.dequantize(qw), truth), "dequantize must give the reference's bits"
    for _, cache in plan.settings():
        small, large = layers.copies(cache, layers.nbytes), layers.copies(cache, dense.nbytes)
        ours = rotate([replace(qw, packed=qw.packed.clone(), absmax=qw.absmax.clone()) for _ in range(small)])
        outs = rotate([torch.empty_like(dense).fill_(1) for _ in range(large)])
        sources = rotate([dense.clone() for _ in range(large)])
        peers = {side: bitsandbytes_dequantize(layers.sides[side], small) for side in (BNB, BNB_DQ)}
        copied = {COPY: lambda outs=outs, sources=sources: outs().copy_(sources())}
        floor = limits.move_ms(layers.nbytes + dense.nbytes, cache)
        into = {OURS: lambda ours=ours, outs=outs: nf4.dequantize(ours(), out=outs())}
        yield plan.measure("dequantize out=", layers.shape, None, cache, into | peers | copied, floor)
        fresh = {OURS: lambda ours=ours: nf4.dequantize(ours())}
        cloned = {CLONE: lambda sources=sources: sources().clone()}
        yield plan.measure("dequantize fresh", layers.shape, None, cache, fresh | peers | cloned, floor)
