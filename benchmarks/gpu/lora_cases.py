"""A layer with an adapter on a GPU: its forward, and its forward and backward."""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

import nf4kernels as nf4

from ..checks import assert_as_exact_as_dense
from ..harness import DENSE, OURS
from ..report.goals import WITHOUT_LORA
from .sides import Sides, bnb_linear, bnb_side
from .timing import Run
from .weights import Weights

RANK, SCALING = 16, 2.0


def measure_lora(run: Run, w: Weights, M: int, rank: int) -> None:
    """Forward of one layer with an adapter, beside the same without it."""
    N, K = w.shape
    new = {"device": run.machine.device, "dtype": torch.bfloat16}
    x, A = torch.randn(M, K, **new), torch.randn(rank, K, **new).mul_(K**-0.5)
    B = torch.randn(N, rank, **new).mul_(0.02)
    ours, dense, theirs = w.in_turn()

    def lora_term() -> Tensor:
        return SCALING * dense_linear(dense_linear(x, A), B)

    sides: Sides = {
        OURS: lambda: nf4.lora_linear(x, ours(), A, B, SCALING),
        WITHOUT_LORA: lambda: nf4.linear(x, ours()),
        DENSE: lambda: dense_linear(x, dense()) + lora_term(),
    }
    sides |= bnb_side(lambda: bnb_linear(x, *theirs()) + lora_term())
    sides = {side: torch.no_grad()(run_side) for side, run_side in sides.items()}
    exact_term = SCALING * (x.double() @ A.double().T) @ B.double().T
    what = f"lora linear {N}x{K}, M={M}, r={rank}"

    def check(side: str, y: Tensor) -> None:
        if side in (OURS, WITHOUT_LORA):
            assert_as_exact_as_dense(y, x, w.decoded.T, what, exact_term if side == OURS else 0)

    sides = run.checked(sides, check, what)
    if OURS in sides:
        flops = 2 * M * N * K + 2 * M * rank * (N + K)
        run.add(f"lora r={rank}", w.shape, M, sides, w.copies, w.nbytes + 2 * (M + rank) * (N + K), flops)


def measure_step(run: Run, w: Weights, M: int) -> None:
    """Forward, and backward to x, lora_A and lora_B, of one layer; beside the same without an adapter."""
    N, K = w.shape
    leaf = {"device": run.machine.device, "dtype": torch.bfloat16, "requires_grad": True}
    x, A = torch.randn(M, K, **leaf), torch.empty(RANK, K, **leaf)
    B, dy = torch.empty(N, RANK, **leaf), torch.randn(M, N, **{**leaf, "requires_grad": False})
    with torch.no_grad():
        A.normal_(std=K**-0.5)
        B.normal_(std=0.02)
    ours, dense, theirs = w.in_turn()

    def gradients(y: Tensor, *leaves: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaves, dy)[0]

    def lora_term() -> Tensor:
        return SCALING * dense_linear(dense_linear(x, A), B)

    sides = {
        OURS: lambda: gradients(nf4.lora_linear(x, ours(), A, B, SCALING), x, A, B),
        WITHOUT_LORA: lambda: gradients(nf4.linear(x, ours()), x),
        DENSE: lambda: gradients(dense_linear(x, dense()) + lora_term(), x, A, B),
    }
    sides |= bnb_side(lambda: gradients(bnb_linear(x, *theirs()) + lora_term(), x, A, B))
    exact_term = SCALING * (dy.double() @ B.detach().double()) @ A.detach().double()

    def check(side: str, dx: Tensor) -> None:
        if side in (OURS, WITHOUT_LORA):
            added = exact_term if side == OURS else 0
            assert_as_exact_as_dense(dx, dy, w.decoded, f"lora step {N}x{K}, M={M}", added)

    sides = run.checked(sides, check, f"lora step {N}x{K}, M={M}")
    if OURS in sides:
        flops = 4 * M * N * K + 6 * M * RANK * (N + K)
        run.add("lora step", w.shape, M, sides, w.copies, 2 * w.nbytes + 4 * M * (N + K), flops)
