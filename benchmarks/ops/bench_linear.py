"""linear in evaluation: ours on the canonical layout beside everybody's repacked weights and a dense product.

torch's INT4 and ggml's layers hold 4-bit weights of their own; each side's product is checked against its own Ŵ.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import nf4kernels as nf4

from ..checks import assert_as_exact_as_dense, assert_close_to_dense, relative_error
from ..harness import INT4, OURS, Plan, Row
from ..limits import Limits
from ..peer_ggml import GgmlLinear, allowed_error
from ..peer_int4 import decoded
from ..peers import Layers, in_turn


def forward(layer: Callable, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return layer()(x)

    return run


def check(layers: Layers, replicas: dict[str, list[nn.Module]], x: Tensor, what: str) -> None:
    """Every side's product of x against fp64, with the weights that the side holds, and close to the dense one."""
    y = {side: forward(in_turn(own, "in"), x)() for side, own in replicas.items()}
    assert_close_to_dense(y, layers.dense_side, what)
    assert_as_exact_as_dense(y[OURS], x, nf4.dequantize(layers.qweight, torch.float32).T, what)
    if INT4 in y:  # its sums run over all of K
        running = torch.finfo(torch.float32).eps * layers.shape[1] ** 0.5
        assert_as_exact_as_dense(y[INT4], x, decoded(layers.dense_weight).T, f"{what}, {INT4}", more=running)
    for side, own in replicas.items():
        if isinstance(own[0], GgmlLinear):
            matrix, rows = own[0].decoded().T, slice(0, 4)
            error = relative_error(y[side][rows], x[rows].double() @ matrix.double())
            assert error <= allowed_error(x), f"{what}, {side}: error {error:.2e}, allowed {allowed_error(x):.2e}"


def rows(layers: Layers, limits: Limits, plan: Plan) -> Iterator[Row]:
    N, K = layers.shape
    replicas = layers.replicas(plan.caches, training=False)
    for M in plan.rows:
        x = torch.randn(M, K, dtype=layers.dtype)
        check(layers, replicas, x, f"linear {N}x{K}, M={M}")
        for layer in (layer for own in replicas.values() for layer in own if isinstance(layer, GgmlLinear)):
            layer.take(x)
        for _, cache in plan.settings():
            sides = {side: forward(in_turn(own, cache), x) for side, own in replicas.items()}
            floor = limits.product_ms(layers.nbytes, 2 * M * N * K, cache)
            yield plan.measure("linear", layers.shape, M, cache, sides, floor)
