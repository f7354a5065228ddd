"""Products of the packed bytes beside slices of the weight and torch's GEMM, bf16: from which M the latter is faster.

`csrc/cpu/choose.h` holds the M; docs/choosing.md what was measured.
"""

from collections.abc import Callable, Iterator

import torch

from nf4kernels.backends.native import CPU_PRODUCTS
from nf4kernels.backends.select import CPU_LIBRARY

from ..checks import assert_as_exact_as_dense
from ..harness import OURS, Plan, Row
from ..peers import Layers, in_turn

SIDES = dict(zip((OURS, "dequantize + GEMM"), CPU_PRODUCTS))
M = (16, 32, 64, 128, 512, 2048)


def by(products: str, op: Callable, x: torch.Tensor, layer: Callable) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with CPU_LIBRARY.running_products(products):
            return op(x, *layer().qweight.op_args())

    return run


def rows(layers: Layers, plan: Plan) -> Iterator[Row]:
    """OURS are the products of the packed bytes, as the op's name says; a ratio is how many times faster they are."""
    (N, K), ops = layers.shape, torch.ops.nf4kernels
    replicas = layers.replicas(plan.caches, training=True)[OURS]
    decoded = replicas[0].dequantize(torch.float32)
    for rows_of_x in plan.rows:
        x, dy = torch.randn(rows_of_x, K).bfloat16(), torch.randn(rows_of_x, N).bfloat16()
        products = (
            ("linear", lambda x, *weight: ops.linear(x, *weight, None), x, decoded.T),
            ("linear_dgrad", ops.linear_dgrad, dy, decoded),
        )
        for name, op, a, matrix in products:
            for side, way in SIDES.items():
                y = by(way, op, a, in_turn(replicas, "in"))()
                assert_as_exact_as_dense(y, a, matrix, f"{name} by {side}, M={rows_of_x}")
            for _, cache in plan.settings():
                calls = {side: by(way, op, a, in_turn(replicas, cache)) for side, way in SIDES.items()}
                yield plan.measure(f"{name}, packed", layers.shape, rows_of_x, cache, calls, None)
