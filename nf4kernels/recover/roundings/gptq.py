"""Second-order rounding to the levels of a codebook: the error of a column is made up for by the columns after it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...functional import dequantize, quantize
from ...quantized_weight import QuantizedWeight
from ..batches import Batch
from .calibration import Statistics
from .encoding import codes_of, decoded_scales, inverted, midpoints_of, scale_of_each, with_codes
from .rounding import LEVELS, SCALES, CalibratedRounding, check_choice, chosen, not_worse
from .scales import refitted_scales

COLUMNS = 128  # whose effect on all others is computed at once
TRIES = 6  # of a tenfold damping


class Gptq(CalibratedRounding):
    """Second-order rounding to the levels of the codebook, with error feedback from column to column.

    Args:
        batches, correct_bias: as in `CalibratedRounding`; only as another rounding's `then` it needs no batches.
        scales: "absmax" as `nf4kernels.quantize` has them, or "search" as in `ScaleSearch`, before any code is chosen.
        levels: "given", or "kmeans" as in `ScaleSearch`, before any code is chosen.
        damping, act_order: as in `gptq`.
        sweeps: passes of coordinate descent over the codes after that, each followed by one over the scales where
            `scales` is "search" and rows are whole blocks.

    Source: GPTQ (arXiv 2210.17323); QuantEase (arXiv 2309.01885).
    """

    WHO = "nf4kernels.recover.Gptq"

    def __init__(
        self,
        batches: Iterable[Batch] | None = None,
        scales: str = "absmax",
        levels: str = "given",
        damping: float = 0.01,
        act_order: bool = True,
        sweeps: int = 0,
        correct_bias: bool = False,
    ) -> None:
        super().__init__(batches, correct_bias)
        check_choice(scales, SCALES, "scales", self.WHO)
        check_choice(levels, LEVELS, "levels", self.WHO)
        if not damping > 0:
            raise ValueError(f"{self.WHO}: damping must be above 0, got {damping}")
        if sweeps < 0:
            raise ValueError(f"{self.WHO}: sweeps must be at least 0, got {sweeps}")
        self.scales, self.levels, self.damping, self.act_order, self.sweeps = scales, levels, damping, act_order, sweeps

    def quantized(self, weight: Tensor, statistics: Statistics | None, options: dict[str, Any]) -> QuantizedWeight:
        if statistics is None:
            raise ValueError(f"{self.WHO}: batches must be given, got None")
        qweight = chosen(weight, statistics, options, self.scales, self.levels, self.WHO)
        qweight = gptq(weight, qweight, statistics.hessian, self.damping, self.act_order)
        if self.sweeps:
            H = damped(statistics.hessian, self.damping)
            error = weight.float() - dequantize(qweight, torch.float32)
            product = error @ H
            for _ in range(self.sweeps):
                qweight = swept(weight, qweight, error, product, H)
                if self.scales == "search" and weight.shape[1] % qweight.block_size == 0:
                    qweight = refitted_scales(error, product, H, qweight)
        return not_worse(weight, qweight, quantize(weight, **options), statistics)


def gptq(
    weight: Tensor, qweight: QuantizedWeight, hessian: Tensor, damping: float = 0.01, act_order: bool = True
) -> QuantizedWeight:
    """The codes of `weight` by error feedback; the decoded scales and the levels of `qweight` are kept.

    Column by column each weight gets its nearest level, and its error, divided by the diagonal of the inverse
    Hessian's Cholesky factor, is taken from the columns that come after. With a diagonal Hessian it is the nearest
    level alone.

    Args:
        weight: `[N, K]`.
        hessian: fp32 `[K, K]`, the mean of x^T x.
        damping: added to the Hessian's diagonal, as a share of the diagonal's mean.
        act_order: columns in the order of falling hessian[k, k]. The bytes keep their order.

    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    K = qweight.shape[1]
    columns = _Columns(qweight)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    H = hessian if order is None else hessian[order][:, order]
    factor = inverse_factor(H, damping)
    W = weight.detach().float().T  # [K, N]: a column is then contiguous
    W = W.clone(memory_format=torch.contiguous_format) if order is None else W[order]
    ranks = torch.empty(W.shape, dtype=torch.int32, device=W.device)
    at = list(range(K)) if order is None else order.tolist()
    diagonal = factor.diagonal().tolist()
    for begin in range(0, K, COLUMNS):
        end = min(begin + COLUMNS, K)
        errors = torch.empty_like(W[begin:end])
        for j in range(begin, end):
            ranks[at[j]], decoded = columns.nearest(at[j], W[j])
            errors[j - begin] = (W[j] - decoded) / diagonal[j]
            W[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - begin], alpha=-1)
        W[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return with_codes(qweight, columns.codes(ranks))


class _Columns:
    """Nearest levels of one column at a time, by the rule of `encoding.nearest_codes`."""

    def __init__(self, qweight: QuantizedWeight) -> None:
        N, K = qweight.shape
        self.scales = scale_of_each(decoded_scales(qweight), (N, K), qweight.block_size).T.contiguous()
        self.inverse = inverted(self.scales)
        self.levels, self.order = qweight.code.sort(stable=True)
        self.midpoints = midpoints_of(self.levels)

    def nearest(self, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """(the ranks of the levels, int32 `[N]`; what they decode to)."""
        rank = torch.bucketize(values * self.inverse[column], self.midpoints, out_int32=True)
        return rank, self.levels[rank] * self.scales[column]

    def codes(self, ranks: Tensor) -> Tensor:
        """uint8 `[N, K]` of ranks `[K, N]`."""
        return self.order.to(torch.uint8)[ranks.long()].T.contiguous()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """fp32 `[K, K]`, upper triangular U with U^T U the inverse of the damped Hessian; computed in fp64.

    A column that is always 0 has no say. Where the damped matrix is not positive definite the damping grows tenfold.

    Raises:
        ValueError: it never is.
    """
    H = damped(hessian.double(), 0)
    for power in range(TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(H, damping * 10**power))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
    raise ValueError("nf4kernels.recover.gptq: hessian must be positive definite once damped, got another")


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) I, a diagonal of 0 read as 1."""
    H = hessian.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    return H


def swept(weight: Tensor, qweight: QuantizedWeight, error: Tensor, product: Tensor, hessian: Tensor) -> QuantizedWeight:
    """One pass of coordinate descent over the columns: each code the best one, all others being as they are.

    tr(E H E^T) never rises.

    Args:
        error: fp32 `[N, K]`, W - Ŵ; product: E @ H. Both are kept up to date in place.

    Source: QuantEase (arXiv 2309.01885), algorithm 1.
    """
    K = qweight.shape[1]
    columns = _Columns(qweight)
    ranks = columns.order.argsort()[codes_of(qweight).long()].T.int().contiguous()
    E, P = error.T.contiguous(), product.T.contiguous()
    decoded = weight.detach().float().T - E
    diagonal = hessian.diagonal().tolist()
    for begin in range(0, K, COLUMNS):
        end = min(begin + COLUMNS, K)
        steps = torch.zeros_like(E[begin:end])
        for j in range(begin, end):
            if not diagonal[j] > 0:
                continue
            ranks[j], found = columns.nearest(j, decoded[j] + P[j] / diagonal[j])
            steps[j - begin] = found - decoded[j]
            P[begin:end].addr_(hessian[j, begin:end], steps[j - begin], alpha=-1)
        E[begin:end] -= steps
        P[:begin].addmm_(hessian[:begin, begin:end], steps, alpha=-1)
        P[end:].addmm_(hessian[end:, begin:end], steps, alpha=-1)
    error.copy_(E.T)
    product.copy_(P.T)
    return with_codes(qweight, columns.codes(ranks))
