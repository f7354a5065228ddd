"""linear, bf16, evaluation: ours on the canonical layout beside bitsandbytes' repacked one and a dense product."""

from collections.abc import Callable, Iterator

import torch

import nf4kernels as nf4

from ..checks import assert_as_exact_as_dense, assert_close_to_dense
from ..harness import DENSE, INT4, OURS, Plan, Row
from ..limits import Limits
from ..peer_int4 import decoded as int4_decoded
from ..peers import Layers, in_turn


def forward(layer: Callable, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return layer()(x)

    return run


def rows(layers: Layers, limits: Limits, plan: Plan) -> Iterator[Row]:
    N, K = layers.shape
    replicas = layers.replicas(plan.caches, training=False)
    decoded = {OURS: nf4.dequantize(layers.qweight, torch.float32).T}
    if INT4 in replicas:
        decoded[INT4] = int4_decoded(layers.dense_weight).T
    for M in plan.rows:
        x = torch.randn(M, K, dtype=torch.bfloat16)
        y = {side: forward(in_turn(own, "in"), x)() for side, own in replicas.items()}
        for side, own in decoded.items():
            assert_as_exact_as_dense(y[side], x, own, f"linear {N}x{K}, M={M}, {side}")
        assert_close_to_dense(y, DENSE, f"linear {N}x{K}, M={M}")
        for _, cache in plan.settings():
            sides = {side: forward(in_turn(own, cache), x) for side, own in replicas.items()}
            floor = limits.product_ms(layers.nbytes, 2 * M * N * K, cache)
            yield plan.measure("linear", layers.shape, M, cache, sides, floor)
