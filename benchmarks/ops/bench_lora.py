"""The training step of one QLoRA layer, r = 16, bf16: forward, and backward to x, lora_A and lora_B.

Ours beside PEFT on bitsandbytes' layer and PEFT on a frozen nn.Linear. Adapters are bf16 on every side: PEFT computes
fp32 ones in fp32, which is slower.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import nf4kernels as nf4

from ..checks import assert_as_exact_as_dense, assert_close_to_dense, relative_error
from ..harness import DENSE, OURS, Plan, Row
from ..limits import Limits
from ..peers import ALPHA, RANK, Layers, in_turn


def factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) of our layer or of PEFT's."""
    found = {name.partition(".")[0]: p for name, p in layer.named_parameters() if name.startswith("lora_")}
    return found["lora_A"], found["lora_B"]


def step(turn: Callable, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Returns dx, dA and dB; `turn` gives a layer with its factors."""
    x = x.clone().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        layer, A, B = turn()
        return torch.autograd.grad(layer(x), (x, A, B), dy)

    return run


def check(layer: nn.Module, decoded: Tensor, x: Tensor, dy: Tensor, what: str) -> None:
    """y, dx, dA and dB against fp64; the adapter's part has bf16 rounding of its own in xA and dyB."""
    A, B = factors(layer)
    s, eps = ALPHA / RANK, torch.finfo(torch.bfloat16).eps
    A64, B64, x64, dy64 = (t.detach().double() for t in (A, B, x, dy))
    with torch.no_grad():
        y = layer(x)
    dx, dA, dB = step(lambda: (layer, A, B), x, dy)()
    assert_as_exact_as_dense(y, x, decoded.T, f"{what}, y", s * (x64 @ A64.T) @ B64.T)
    assert_as_exact_as_dense(dx, dy, decoded, f"{what}, dx", s * (dy64 @ B64) @ A64)
    for name, actual, exact in (("dA", dA, s * (dy64 @ B64).T @ x64), ("dB", dB, s * dy64.T @ (x64 @ A64.T))):
        error = relative_error(actual, exact)
        assert error < eps, f"{what}, {name}: error {error:.2e} against fp64, two roundings to bf16 allow {eps:.2e}"


def rows(layers: Layers, limits: Limits, plan: Plan) -> Iterator[Row]:
    N, K = layers.shape
    sides = {
        side: [(layer, *factors(layer)) for layer in own]
        for side, own in layers.replicas(plan.caches, training=True, lora=True).items()
    }
    decoded = nf4.dequantize(layers.qweight, torch.float32)
    for M in plan.rows:
        x, dy = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(M, N, dtype=torch.bfloat16)
        check(sides[OURS][0][0], decoded, x, dy, f"lora {N}x{K}, M={M}")
        with torch.no_grad():  # the products without the adapters, which are drawn anew on every side
            y = {side: frozen_part(own[0][0])(x) for side, own in sides.items()}
        assert_close_to_dense(y, DENSE, f"lora {N}x{K}, M={M}")
        for _, cache in plan.settings():
            steps = {side: step(in_turn(own, cache), x, dy) for side, own in sides.items()}
            flops = 4 * M * N * K + 6 * M * RANK * (N + K)
            floor = limits.product_ms(layers.nbytes, flops, cache, passes=2)
            yield plan.measure("lora step", layers.shape, M, cache, steps, floor)


def frozen_part(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, nf4.QuantLinear):
        return lambda x: nf4.linear(x, layer.qweight)
    return layer.get_base_layer()
