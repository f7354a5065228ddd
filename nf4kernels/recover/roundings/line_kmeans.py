"""Weighted k-means on a line, on a histogram: the 16 levels that a distribution's values are rounded to best."""

import torch
from torch import Tensor

from .encoding import nearest_codes

LEVELS = 16
COARSE = 1 << 10  # bins of the histogram whose best levels the iterations start from


def line_kmeans(mass: Tensor, moment: Tensor, given: Tensor, iterations: int) -> Tensor:
    """fp32 `[16]`, ascending in [-1, 1]: the levels with the least sum of mass (value - level)^2.

    The best levels of a coarse histogram by dynamic programming, or `given` where that is better, then Lloyd's
    iterations on the fine one, which never raise the sum. A level that no value is nearest to stays where it is.

    Args:
        mass: fp64 `[bins]`, of the values in each bin of [-1, 1]; the number of bins is a multiple of 1024.
        moment: the same of mass times value.
        given: fp32 `[16]`, ascending.
    """
    histogram = mass, moment
    starts = [given, _best_levels(*(each.view(COARSE, -1).sum(1) for each in histogram))]
    levels = min(starts, key=lambda start: _error(start, *histogram))
    for _ in range(iterations):
        nearest = _nearest(levels, *histogram)
        masses = torch.zeros(LEVELS, dtype=torch.float64, device=mass.device).index_add_(0, nearest, mass)
        moments = torch.zeros_like(masses).index_add_(0, nearest, moment)
        means = (moments / masses.clamp(min=1e-300)).float().clamp(-1, 1)
        moved = torch.where(masses > 0, means, levels).sort().values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def _centres(mass: Tensor, moment: Tensor) -> Tensor:
    return torch.where(mass > 0, moment / mass.clamp(min=1e-300), 0)


def _nearest(levels: Tensor, mass: Tensor, moment: Tensor) -> Tensor:
    return nearest_codes(_centres(mass, moment).float(), torch.ones((), device=mass.device), levels).long()


def _error(levels: Tensor, mass: Tensor, moment: Tensor) -> float:
    """Less the part that no level changes, that of each bin about its own mean."""
    left = _centres(mass, moment) - levels.double()[_nearest(levels, mass, moment)]
    return (mass * left.square()).sum().item()


def _best_levels(mass: Tensor, moment: Tensor) -> Tensor:
    """fp32 `[16]`, ascending: the means of the 16 runs of bins with the least error about them, of all such runs.

    Source: Ckmeans.1d.dp (Wang and Song, The R Journal 3/2, 2011), without its short cuts.
    """
    bins = len(mass)
    square = mass * _centres(mass, moment).square()
    ends = [torch.cat([each.new_zeros(1), each.cumsum(0)]) for each in (mass, moment, square)]
    m, s, q = (end[None, :] - end[:, None] for end in ends)  # of the bins i to j - 1
    cost = (q - s.square() / m.clamp(min=1e-300)).clamp_(min=0)
    cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).tril_(-1), torch.inf)
    best, cuts = cost[0], []
    for _ in range(LEVELS - 1):
        best, cut = (best[:, None] + cost).min(0)
        cuts.append(cut)
    levels, end = [], bins
    for cut in [*reversed(cuts), torch.zeros_like(cuts[0])]:
        begin = int(cut[end])
        levels.append((s[begin, end] / m[begin, end]).item() if m[begin, end] > 0 else None)
        end = begin
    there = [level for level in levels if level is not None]
    return torch.tensor(there + there[:1] * (LEVELS - len(there)), device=mass.device).sort().values.clamp(-1, 1)
