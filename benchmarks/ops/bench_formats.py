"""Other formats and dense bf16 beside NF4 at block size 64: what a finer block, another scale or a byte costs."""

from collections.abc import Iterator

import torch

import nf4kernels as nf4

from ..checks import assert_as_exact_as_dense
from ..harness import DENSE, OURS, Plan, Row
from ..peers import Layers, in_turn, used_copies
from .bench_linear import forward
from .bench_linear_dgrad import forward_backward

FORMATS = {"mxfp4": {}, "nvfp4": {}, "int4_symmetric": {"block_size": 128}, "int8": {}}
FORWARD_M, TRAINING_M = (1, 4, 16, 64, 512), (16,)


def rows(layers: Layers, plan: Plan) -> Iterator[Row]:
    """OURS is NF4; a ratio is how many times faster it is than the same weight in another format, or dense."""
    N, K = layers.shape
    dense = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    dense.weight.data.copy_(layers.dense_weight)
    sides = {OURS: nf4.QuantLinear.from_linear(dense)}
    sides |= {name: nf4.QuantLinear.from_linear(dense, codebook=name, **own) for name, own in FORMATS.items()}
    sides[DENSE] = dense
    replicas = {}
    for side, layer in sides.items():
        count = max(layers.copies(cache, layer.weight.nbytes) for cache in plan.caches)
        replicas[side] = used_copies(layer, count, torch.zeros(1, K, dtype=torch.bfloat16))
    for M in plan.rows:
        x, dy = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(M, N, dtype=torch.bfloat16)
        for side, layer in sides.items():
            decoded = layer.weight.float() if side == DENSE else layer.dequantize(torch.float32)
            assert_as_exact_as_dense(forward(lambda layer=layer: layer, x)(), x, decoded.T, f"{side}, M={M}")
            dx = forward_backward(lambda layer=layer: layer, x, dy)()
            assert_as_exact_as_dense(dx, dy, decoded, f"gradient of {side}, M={M}")
        for _, cache in plan.settings():
            calls = {side: forward(in_turn(own, cache), x) for side, own in replicas.items()}
            yield plan.measure("formats", layers.shape, M, cache, calls, None)
            if M in TRAINING_M:
                calls = {side: forward_backward(in_turn(own, cache), x, dy) for side, own in replicas.items()}
                yield plan.measure("formats + dgrad", layers.shape, M, cache, calls, None)
