"""A codebook of its own for each layer: 16 levels by weighted k-means."""

import torch
from torch import Tensor

from .line_kmeans import line_kmeans

ITERATIONS = 30
BINS = 1 << 16  # of the histogram that Lloyd's iterations run on: 2^-15 of the scale apart


def fitted_levels(weight: Tensor, scales: Tensor, code: Tensor, importance: Tensor | None = None) -> Tensor:
    """fp32 `[16]`, ascending in [-1, 1]: the levels with the least sum of importance[k] scale^2 (w / scale - level)^2.

    By `line_kmeans` on a histogram of w / scale, from `code` where that is better than the best levels of a coarse one.
    Values beyond 1 count at 1, as they are rounded.

    Args:
        weight: fp32 `[N, K]`.
        scales: fp32 `[N, K]`, of each weight.
        code: fp32 `[16]`.
        importance: fp32 `[K]` or None, as of `searched_scales`.
    """
    safe = scales.abs() >= 2.0**-126
    values = torch.where(safe, weight / torch.where(safe, scales, 1), 0).clamp_(-1, 1)
    weights = (scales.square() if importance is None else scales.square() * importance).reshape(-1)
    bins = ((values.reshape(-1) + 1) * ((BINS - 1) / 2)).round_().long()
    mass = torch.zeros(BINS, dtype=torch.float64, device=weight.device).index_add_(0, bins, weights.double())
    moment = torch.zeros_like(mass).index_add_(0, bins, (weights * values.reshape(-1)).double())
    given = code.sort().values.clamp(-1, 1)
    return line_kmeans(mass, moment, given, ITERATIONS) if mass.sum() > 0 else given
