"""dequantize NF4 with double quantization -> bf16: into a reused output, and as an op with a fresh one."""

from collections.abc import Iterator

import torch

import nf4kernels as nf4

from .harness import OURS, Limits, Row, measure
from .peers import BNB_DQ, bnb
from .shapes import LINEAR


def rows(limits: Limits) -> Iterator[Row]:
    for N, K in LINEAR.values():
        w = torch.randn(N, K).mul_(0.02).bfloat16()
        qw = nf4.quantize(w)
        assert torch.equal(nf4.dequantize(qw), torch.ops.nf4kernels.dequantize(*qw.op_args(), 0, N, 0, K, w.dtype))
        packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        out = torch.empty_like(w)
        floor = limits.floor_ms(read=0.52 * N * K, write=2 * N * K)
        peer = {BNB_DQ: lambda packed=packed, state=state: bnb.functional.dequantize_4bit(packed, state)}
        copied = {"copy_ into it": lambda out=out, w=w: out.copy_(w)}
        into = {OURS: lambda qw=qw, out=out: nf4.dequantize(qw, out=out)}
        yield measure("dequantize out=", (N, K), "", into | peer | copied, floor)
        yield measure("dequantize fresh", (N, K), "", {OURS: lambda qw=qw: nf4.dequantize(qw)} | peer, floor)
