"""Products of experts on a GPU, beside torch's grouped product and a loop over bitsandbytes' products."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from ..checks import assert_as_exact_as_dense, assert_close_to_dense
from ..harness import DENSE, OURS, rotate
from .sides import Sides, bnb_dgrad, bnb_linear, bnb_side, forced_sides, is_ours, triton_side
from .timing import Run
from .weights import ExpertWeights

ops = torch.ops.nf4kernels
GROUPED = {"grouped linear": "grouped_linear", "grouped dgrad": "grouped_linear_dgrad"}  # row -> op


def measure_grouped(run: Run, w: ExpertWeights, tokens: int) -> None:
    """Both directions, each token through experts drawn at random, beside torch's grouped product in bf16."""
    counts = w.shape.route(tokens)
    for name, width in zip(GROUPED, (w.shape.K, w.shape.N)):
        a = torch.randn(sum(counts), width, device=run.machine.device, dtype=torch.bfloat16)
        _measure_experts(run, name, w, a, counts)


def _measure_experts(run: Run, name: str, w: ExpertWeights, a: Tensor, counts: list[int]) -> None:
    """bitsandbytes has no product with experts: a loop over those that have rows, which the host knows here."""
    E, N, K, rows = w.shape.experts, w.shape.N, w.shape.K, len(a)
    dgrad = name == "grouped dgrad"
    ends = list(accumulate(counts))
    active = [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts)) if count]
    offsets = torch.tensor(ends, dtype=torch.int32, device=a.device)
    ours, dense = rotate(w.ours), rotate(w.dense)

    def product(function: Callable) -> Tensor:
        return function(a, offsets, *ours().op_args())

    def native() -> Tensor:
        return product(getattr(ops, GROUPED[name]))

    def torchs() -> Tensor:
        weight = dense()
        return torch._grouped_mm(a, weight if dgrad else weight.mT, offs=offsets)

    def bitsandbytes() -> Tensor:
        multiply = bnb_dgrad if dgrad else bnb_linear
        return torch.cat([multiply(a[part], *w.bnb[e]) for e, part in active])

    sides: Sides = {OURS: native, DENSE: torchs}
    sides |= bnb_side(torch.no_grad()(bitsandbytes))
    sides |= triton_side(lambda by_op: product(by_op[GROUPED[name]]))
    sides |= dict.fromkeys(forced_sides(name, rows), native)
    what = f"{name} {E}x{N}x{K}, rows={rows}"
    unquantized = torch.cat([a[part] @ (w.dense[0][e] if dgrad else w.dense[0][e].T) for e, part in active])

    def check(side: str, result: Tensor) -> None:
        if is_ours(side):
            for e, part in active[:: max(1, len(active) // 4)]:
                matrix = w.decoded(e) if dgrad else w.decoded(e).T
                assert_as_exact_as_dense(result[part], a[part], matrix, f"{what}, expert {e}")
        assert_close_to_dense({side: result, DENSE: unquantized}, DENSE, what)

    sides = run.checked(sides, check, what)
    if OURS in sides:
        moved = len(active) * w.nbytes + 2 * rows * (N + K)
        run.add(name, (N, K), rows, sides, len(w.ours), moved, 2 * rows * N * K)
