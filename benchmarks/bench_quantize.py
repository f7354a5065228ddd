"""quantize bf16 -> NF4 with double quantization, beside bitsandbytes."""

from collections.abc import Iterator

import torch

import nf4kernels as nf4

from .harness import OURS, Limits, Row, measure
from .peers import BNB_DQ, bnb
from .shapes import LINEAR


def rows(limits: Limits) -> Iterator[Row]:
    for N, K in LINEAR.values():
        w = torch.randn(N, K).mul_(0.02).bfloat16()
        sides = {
            OURS: lambda w=w: nf4.quantize(w),
            BNB_DQ: lambda w=w: bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True),
        }
        yield measure("quantize", (N, K), "", sides, limits.floor_ms(read=2 * N * K, write=0.52 * N * K))
