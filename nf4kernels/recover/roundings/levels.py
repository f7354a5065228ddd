"""A codebook of its own for each layer: 16 levels by weighted k-means."""

import torch
from torch import Tensor

from .encoding import nearest_codes

ITERATIONS = 30
BINS = 1 << 16  # of the histogram that k-means runs on: 2^-15 of the scale apart


def fitted_levels(weight: Tensor, scales: Tensor, code: Tensor, importance: Tensor | None = None) -> Tensor:
    """fp32 `[16]`, ascending in [-1, 1]: the levels with the least sum of importance[k] scale^2 (w / scale - level)^2.

    Lloyd's iterations from `code`, which never raise that sum, on a histogram of w / scale; values beyond 1 count at 1,
    as they are rounded. A level that no weight is nearest to stays where it is.

    Args:
        weight: fp32 `[N, K]`.
        scales: fp32 `[N, K]`, of each weight.
        code: fp32 `[16]`, the start.
        importance: fp32 `[K]` or None, as of `searched_scales`.
    """
    safe = scales.abs() >= 2.0**-126
    values = torch.where(safe, weight / torch.where(safe, scales, 1), 0).clamp_(-1, 1)
    weights = (scales.square() if importance is None else scales.square() * importance).reshape(-1)
    bins = ((values.reshape(-1) + 1) * ((BINS - 1) / 2)).round_().long()
    mass = torch.zeros(BINS, dtype=torch.float64, device=weight.device).index_add_(0, bins, weights.double())
    moment = torch.zeros_like(mass).index_add_(0, bins, (weights * values.reshape(-1)).double())
    centres = torch.where(mass > 0, moment / mass.clamp(min=1e-300), 0).float()
    levels = code.sort().values.clamp(-1, 1)
    one = torch.ones((), device=weight.device)
    for _ in range(ITERATIONS):
        nearest = nearest_codes(centres, one, levels).long()
        masses = torch.zeros(16, dtype=torch.float64, device=weight.device).index_add_(0, nearest, mass)
        moments = torch.zeros_like(masses).index_add_(0, nearest, moment)
        means = (moments / masses.clamp(min=1e-300)).float().clamp(-1, 1)
        moved = torch.where(masses > 0, means, levels).sort().values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels
