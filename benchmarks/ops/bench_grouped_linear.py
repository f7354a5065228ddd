"""grouped_linear, bf16: ours beside torch's grouped_mm and a loop of dense products, forward and with dgrad.

Each token goes to `top_k` experts drawn at random. All experts of a layer together
are larger than any cache. The floor counts the weights of the experts that some token chose.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

import nf4kernels as nf4

from ..checks import assert_as_exact_as_dense, assert_close_to_dense
from ..harness import DENSE, OURS, Plan, Row
from ..limits import Limits
from ..shapes import ExpertsShape

GROUPED_MM = "torch grouped_mm bf16"
TOKENS = (1, 16, 64, 512)


def loop(x: Tensor, counts: list[int], weight: Tensor) -> Tensor:
    """As transformers' eager experts: one product for each expert that has rows."""
    parts = x.split([count for count in counts if count])
    return torch.cat([linear(part, weight[e]) for part, e in zip(parts, (e for e, c in enumerate(counts) if c))])


def sides_of(
    qweights: nf4.QuantizedExperts, weight: Tensor, counts: list[int]
) -> dict[str, Callable[[Tensor], Tensor]]:
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    transposed = weight.mT
    return {
        OURS: lambda x: nf4.grouped_linear(x, offsets, qweights),
        GROUPED_MM: lambda x: grouped_mm(x, transposed, offs=offsets),
        DENSE: lambda x: loop(x, counts, weight),
    }


def gradient(side: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(side(x), x, dy)[0]


def rows(shape: ExpertsShape, limits: Limits, plan: Plan) -> Iterator[Row]:
    E, N, K = shape.experts, shape.N, shape.K
    weight = torch.empty(E, N, K, dtype=torch.bfloat16).normal_(std=0.02)
    qweights = nf4.quantize_experts(weight)
    expert_bytes = (qweights.packed.nbytes + qweights.absmax.nbytes) // E
    for tokens in plan.rows:
        what = f"{E}x{N}x{K}, {tokens} tokens"
        counts = shape.route(tokens)
        T = sum(counts)
        x, dy = torch.randn(T, K, dtype=torch.bfloat16), torch.randn(T, N, dtype=torch.bfloat16)
        sides = sides_of(qweights, weight, counts)
        y = {side: run(x) for side, run in sides.items()}
        dx = {side: gradient(run, x, dy)() for side, run in sides.items()}
        fullest = max(range(E), key=counts.__getitem__)
        own = slice(sum(counts[:fullest]), sum(counts[: fullest + 1]))
        decoded = nf4.dequantize(qweights[fullest], torch.float32)
        assert_as_exact_as_dense(y[OURS][own], x[own], decoded.T, f"grouped linear {what}")
        assert_as_exact_as_dense(dx[OURS][own], dy[own], decoded, f"grouped dgrad {what}")
        assert_close_to_dense(y, DENSE, f"grouped linear {what}")
        assert_close_to_dense(dx, DENSE, f"grouped dgrad {what}")
        nbytes, flops = expert_bytes * sum(count > 0 for count in counts), 2 * T * N * K
        for _, cache in plan.settings():
            forward = {side: partial(run, x) for side, run in sides.items()}
            floor = limits.product_ms(nbytes, flops, cache)
            yield plan.measure("grouped linear", (E, N, K), tokens, cache, forward, floor)
            both = {side: gradient(run, x, dy) for side, run in sides.items()}
            floor = limits.product_ms(nbytes, 2 * flops, cache, passes=2)
            yield plan.measure("grouped + dgrad", (E, N, K), tokens, cache, both, floor)
