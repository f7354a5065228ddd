"""Forward and backward to x through the frozen weight, bf16, training mode: what a QLoRA step does in each layer."""

from collections.abc import Callable, Iterator

import torch

from .harness import OURS, Limits, Row, measure
from .peers import DENSE, layers
from .shapes import LINEAR, ROWS


def forward_backward(layer: Callable, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        layer()(leaf).backward(dy)
        return leaf.grad

    return run


def rows(limits: Limits) -> Iterator[Row]:
    for N, K in LINEAR.values():
        rotating = layers(torch.randn(N, K).mul_(0.02).bfloat16(), training=True)
        for M in ROWS:
            x, dy = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(M, N, dtype=torch.bfloat16)
            sides = {name: forward_backward(layer, x, dy) for name, layer in rotating.items()}
            difference = (sides[OURS]() - sides[DENSE]()).float().norm() / sides[DENSE]().float().norm()
            assert difference < 0.12, f"NF4 changes Gaussian weights by 9 %, the gradient changed by {difference:.1%}"
            floor = limits.floor_ms(read=2 * 0.52 * N * K, flops=4 * M * N * K)
            yield measure("linear + dgrad", (N, K), M, sides, floor)
