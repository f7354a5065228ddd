"""quantize bf16 -> NF4 with double quantization, beside bitsandbytes; weights are not in a cache when it begins."""

from collections.abc import Iterator
from dataclasses import replace

import torch

import nf4kernels as nf4

from ..harness import BNB, BNB_DQ, OURS, Plan, Row, rotate
from ..limits import Limits
from ..peers import Layers, bnb


def bitsandbytes_quantize(weight, double_quant: bool):
    return lambda: bnb.functional.quantize_4bit(weight(), quant_type="nf4", compress_statistics=double_quant)


def rows(layers: Layers, limits: Limits, plan: Plan) -> Iterator[Row]:
    weights = [layers.dense_weight.clone() for _ in range(layers.copies("out", layers.dense_weight.nbytes))]
    ours, (theirs, _) = nf4.quantize(weights[0]), bnb.functional.quantize_4bit(weights[0], quant_type="nf4")
    assert torch.equal(ours.packed.view(-1), theirs.view(-1)), "the packed bytes must be bitsandbytes'"
    weight = rotate(weights)
    floor_bytes = weights[0].nbytes + layers.nbytes
    for _, cache in replace(plan, caches=("out",)).settings():
        sides = {
            OURS: lambda: nf4.quantize(weight()),
            BNB: bitsandbytes_quantize(weight, double_quant=False),
            BNB_DQ: bitsandbytes_quantize(weight, double_quant=True),
        }
        yield plan.measure("quantize", layers.shape, None, cache, sides, limits.move_ms(floor_bytes, cache))
