"""Forward and backward to x through the frozen weight, training mode: what a QLoRA step does in each layer."""

from collections.abc import Callable, Iterator

import torch

import nf4kernels as nf4

from ..checks import assert_as_exact_as_dense, assert_close_to_dense
from ..harness import OURS, Plan, Row
from ..limits import Limits
from ..peers import Layers, in_turn


def forward_backward(layer: Callable, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], torch.Tensor]:
    x = x.clone().requires_grad_()

    def run() -> torch.Tensor:
        (dx,) = torch.autograd.grad(layer()(x), x, dy)
        return dx

    return run


def rows(layers: Layers, limits: Limits, plan: Plan) -> Iterator[Row]:
    N, K = layers.shape
    replicas = layers.replicas(plan.caches, training=True)
    decoded = nf4.dequantize(layers.qweight, torch.float32)
    for M in plan.rows:
        x, dy = torch.randn(M, K, dtype=layers.dtype), torch.randn(M, N, dtype=layers.dtype)
        dx = {side: forward_backward(in_turn(own, "in"), x, dy)() for side, own in replicas.items()}
        assert_as_exact_as_dense(dx[OURS], dy, decoded, f"dgrad {N}x{K}, M={M}")
        assert_close_to_dense(dx, layers.dense_side, f"dgrad {N}x{K}, M={M}")
        for _, cache in plan.settings():
            sides = {side: forward_backward(in_turn(own, cache), x, dy) for side, own in replicas.items()}
            floor = limits.product_ms(layers.nbytes, 4 * M * N * K, cache, passes=2)
            yield plan.measure("linear + dgrad", layers.shape, M, cache, sides, floor)
