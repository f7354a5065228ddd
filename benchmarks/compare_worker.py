"""Times the cases of `compare` with the nf4kernels that PYTHONPATH gives; `compare` runs two of these in turns.

One line a message: it gets the number of a case, and answers with milliseconds a call. Only what old versions have too
is used: quantize, dequantize, linear, QuantLinear.
"""

import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

import nf4kernels as nf4

CACHE_BYTES = 96 << 20
# Threads of the other process spin on for some milliseconds after its turn and take this one's cores meanwhile.
SETTLE_SECONDS, MEASURE_SECONDS = 0.02, 0.04


@cache
def weight(N: int, K: int) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


@cache
def layers(N: int, K: int) -> Callable[[], nf4.QuantLinear]:
    """A function that returns layers in turn, so many that no cache holds them; a small one alone."""
    dense = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    dense.weight.copy_(weight(N, K))
    count = -(-CACHE_BYTES // (N * K // 2)) if N * K > 2**20 else 1
    replicas = [nf4.QuantLinear.from_linear(dense) for _ in range(count)]
    turn = [0]

    def next_layer() -> nf4.QuantLinear:
        turn[0] = (turn[0] + 1) % count
        return replicas[turn[0]]

    return next_layer


def quantize(N: int, K: int, M: int) -> Callable:
    return lambda: nf4.quantize(weight(N, K))


def dequantize(N: int, K: int, M: int) -> Callable:
    qw, out = nf4.quantize(weight(N, K)), torch.empty_like(weight(N, K))
    return lambda: nf4.dequantize(qw, out=out)


def linear(N: int, K: int, M: int) -> Callable:
    x, layer = torch.randn(M, K, dtype=torch.bfloat16), layers(N, K)

    def run():
        with torch.no_grad():
            return layer()(x)

    return run


def linear_dgrad(N: int, K: int, M: int) -> Callable:
    x, dy = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True), torch.randn(M, N, dtype=torch.bfloat16)
    layer = layers(N, K)
    return lambda: torch.autograd.grad(layer()(x), x, dy)


CASES = (
    (quantize, 4096, 4096, 0),
    (dequantize, 4096, 4096, 0),
    (linear, 576, 576, 1),
    (linear, 4096, 4096, 1),
    (linear, 4096, 4096, 4),
    (linear, 4096, 4096, 16),
    (linear, 4096, 4096, 64),
    (linear, 4096, 4096, 512),
    (linear, 11008, 4096, 1),
    (linear, 4096, 8192, 1),
    (linear, 4096, 11008, 1),
    (linear, 4096, 14336, 1),
    (linear, 4096, 14336, 2),
    (linear, 4096, 14336, 4),
    (linear, 8192, 28672, 1),
    (linear_dgrad, 576, 576, 16),
    (linear_dgrad, 4096, 4096, 16),
    (linear_dgrad, 4096, 4096, 64),
    (linear_dgrad, 4096, 4096, 512),
)


def case_name(case: tuple) -> str:
    op, N, K, M = case
    return f"{op.__name__} {N}x{K}" + (f", M={M}" if M else "")


def milliseconds(run: Callable) -> float:
    """A call's, the median of as many as fit."""
    times: list[float] = []
    begin = time.perf_counter()
    while (now := time.perf_counter()) < begin + SETTLE_SECONDS + MEASURE_SECONDS or not times:
        run()
        took = time.perf_counter() - now
        if now >= begin + SETTLE_SECONDS:
            times.append(took * 1e3)
    return sorted(times)[len(times) // 2]


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed must not come between the answers
    implementation, reason = nf4.backend_info().devices["cpu"]
    print(f"{Path(nf4.__file__).parent}\t{implementation}\t{reason}", file=answers, flush=True)
    runs: dict[int, Callable] = {}
    for line in sys.stdin:
        number = int(line)
        if number not in runs:
            op, *sizes = CASES[number]
            runs[number] = op(*sizes)
            runs[number]()
        print(milliseconds(runs[number]), file=answers, flush=True)


if __name__ == "__main__":
    main()
