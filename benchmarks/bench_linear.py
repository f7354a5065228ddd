"""linear, bf16, evaluation: ours on the canonical layout beside bitsandbytes' repacked one and a dense product."""

from collections.abc import Callable, Iterator

import torch

from .harness import OURS, Limits, Row, measure
from .peers import DENSE, layers
from .shapes import LINEAR, ROWS


def forward(layer: Callable, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return layer()(x)

    return run


def rows(limits: Limits) -> Iterator[Row]:
    for N, K in LINEAR.values():
        rotating = layers(torch.randn(N, K).mul_(0.02).bfloat16(), training=False)
        for M in ROWS:
            x = torch.randn(M, K, dtype=torch.bfloat16)
            sides = {name: forward(layer, x) for name, layer in rotating.items()}
            difference = (sides[OURS]() - sides[DENSE]()).float().norm() / sides[DENSE]().float().norm()
            assert difference < 0.12, f"NF4 changes Gaussian weights by 9 %, the output changed by {difference:.1%}"
            yield measure("linear", (N, K), M, sides, limits.floor_ms(read=0.52 * N * K, flops=2 * M * N * K))
