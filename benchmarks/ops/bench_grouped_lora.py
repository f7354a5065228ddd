"""The training step of one weight of experts with LoRA, r = 16, bf16: forward, and backward to x, lora_A and lora_B.

Ours beside the same product with LoRA's terms by torch (every expert's inner product for every row, those of other
experts zeroed), and beside dense experts as PEFT trains them: Ŵ + s B A of all experts first, then torch's grouped_mm.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

import nf4kernels as nf4
from nf4kernels.autograd_lora import composed_grouped_lora_linear

from ..checks import relative_error
from ..harness import OURS, Plan, Row
from ..limits import Limits
from ..peers import ALPHA, RANK
from ..shapes import ExpertsShape

COMPOSED, MERGED = "terms by torch", "PEFT on dense experts"


def sides_of(
    qweights: nf4.QuantizedExperts, weight: Tensor, offsets: Tensor
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    s = ALPHA / RANK
    arguments = qweights.op_args()
    return {
        OURS: lambda x, A, B: nf4.grouped_lora_linear(x, offsets, qweights, A, B, s),
        COMPOSED: lambda x, A, B: composed_grouped_lora_linear(x, offsets, A, B, None, s, 0.0, arguments),
        MERGED: lambda x, A, B: grouped_mm(x, torch.baddbmm(weight, B, A, alpha=s).mT, offs=offsets),
    }


def step(side: Callable[..., Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Returns y, dx, dA and dB."""

    def run() -> tuple[Tensor, ...]:
        y = side(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return run


def check(
    actual: tuple[Tensor, ...], leaves: tuple[Tensor, ...], dy: Tensor, own: slice, expert: int, w: Tensor
) -> None:
    """One expert's part against fp64; xA and dyB are rounded to bf16."""
    x, A, B = (t.detach().double() for t in (leaves[0][own], leaves[1][expert], leaves[2][expert]))
    s, dy64, w64 = ALPHA / RANK, dy[own].double(), w.double()
    exact = (
        x @ w64.T + s * x @ A.T @ B.T, dy64 @ w64 + s * dy64 @ B @ A, s * (dy64 @ B).T @ x, s * dy64.T @ (x @ A.T)
    )  # fmt: skip
    parts = (actual[0][own], actual[1][own], actual[2][expert], actual[3][expert])
    for name, part, right in zip(("y", "dx", "dA", "dB"), parts, exact):
        error = relative_error(part, right)
        assert error < torch.finfo(torch.bfloat16).eps, f"grouped lora, {name}: error {error:.2e} against fp64"


def rows(shape: ExpertsShape, limits: Limits, plan: Plan) -> Iterator[Row]:
    E, N, K = shape.experts, shape.N, shape.K
    weight = torch.empty(E, N, K, dtype=torch.bfloat16).normal_(std=0.02)
    qweights = nf4.quantize_experts(weight)
    expert_bytes = (qweights.packed.nbytes + qweights.absmax.nbytes) // E
    for tokens in plan.rows:
        counts = shape.route(tokens)
        T, offsets = sum(counts), torch.tensor(counts).cumsum(0).to(torch.int32)
        dy = torch.randn(T, N, dtype=torch.bfloat16)
        sizes = ((T, K), (E, RANK, K), (E, N, RANK))
        leaves = tuple(torch.randn(size, dtype=torch.bfloat16).mul_(0.1).requires_grad_() for size in sizes)
        steps = {side: step(run, leaves, dy) for side, run in sides_of(qweights, weight, offsets).items()}
        fullest = max(range(E), key=counts.__getitem__)
        own = slice(sum(counts[:fullest]), sum(counts[: fullest + 1]))
        check(steps[OURS](), leaves, dy, own, fullest, nf4.dequantize(qweights[fullest], torch.float32))
        nbytes = expert_bytes * sum(count > 0 for count in counts)
        flops = 4 * T * N * K + 6 * T * RANK * (N + K)
        for _, cache in plan.settings():
            floor = limits.product_ms(nbytes, flops, cache, passes=2)
            yield plan.measure("grouped lora step", (E, N, K), tokens, cache, steps, floor)
