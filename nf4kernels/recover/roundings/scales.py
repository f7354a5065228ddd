"""Block scales other than the largest weight: searched for the least error, among those that can be stored."""

import torch
from torch import Tensor

from ...quantized_weight import QuantizedWeight
from .encoding import Lattice, codes_of, nearest_codes, with_codes

FACTORS = tuple(i / 20 for i in range(10, 24))  # of the scale that quantize chose
FITS = 3  # of the scale to the codes by least squares, after the best factor
CHUNK = 1 << 20  # weights that are searched at a time


def searched_scales(weight: Tensor, qweight: QuantizedWeight, importance: Tensor | None = None) -> QuantizedWeight:
    """For each block the storable scale with the least sum over k of importance[k] (w_k - scale * code)^2.

    The scales of `qweight` times FACTORS are tried, then the least-squares scale of the best one's codes; each as it
    is decoded after being stored, with the codes nearest for that. No block is worse than with its nearest codes at
    the scale that `qweight` has. Superblocks' numbers stay as they are.

    Args:
        weight: `[N, K]`, what `qweight` was quantized from.
        importance: fp32 `[K]`, of each input, as the mean of its squares; None is the same for all.
    """
    N, K = qweight.shape
    size = qweight.block_size
    flat = weight.detach().reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)
    lattice, stored = Lattice.of(qweight), qweight.absmax.reshape(-1).clone()
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=flat.device)
    positions = torch.arange(size, device=flat.device)
    for begin in range(0, len(blocks), max(CHUNK // size, 1)):
        part = slice(begin, begin + max(CHUNK // size, 1))
        values = blocks[part]
        if importance is None:
            weights = torch.ones((), device=flat.device)
        else:
            starts = torch.arange(begin, begin + len(values), device=flat.device) * size
            weights = importance[(starts[:, None] + positions) % K]
        stored[part], codes[part] = _searched(values, weights, lattice.part(part), stored[part], qweight.code)
    return with_codes(qweight, codes.view(-1)[: N * K].view(N, K), stored)


def _searched(values: Tensor, weights: Tensor, lattice: Lattice, stored: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """(the stored scales, the codes) of blocks `[B, size]`."""
    first = lattice.decoded(stored)

    def rounded(candidate: Tensor) -> tuple[Tensor, Tensor]:
        scales = lattice.decoded(candidate)[:, None]
        nearest = nearest_codes(values, scales, code)
        return nearest, ((code[nearest.long()] * scales - values).square_().mul_(weights)).sum(1)

    codes, best = rounded(stored)

    def try_scales(candidate: Tensor) -> None:
        nonlocal best, codes, stored
        nearest, errors = rounded(candidate)
        better = errors < best
        best = torch.where(better, errors, best)
        codes, stored = torch.where(better[:, None], nearest, codes), torch.where(better, candidate, stored)

    for factor in FACTORS:
        try_scales(lattice.nearest(first * factor))
    for _ in range(FITS):
        levels = code[codes.long()]
        norms = (levels.square() * weights).sum(1)
        fitted = (levels * values * weights).sum(1) / norms.clamp(min=1e-30)
        try_scales(lattice.nearest(torch.where(norms > 0, fitted, first)))
    return stored, codes


def refitted_scales(error: Tensor, product: Tensor, hessian: Tensor, qweight: QuantizedWeight) -> QuantizedWeight:
    """One pass over the blocks of each row, each given the storable scale with the least tr(E H E^T), codes kept.

    Args:
        error: fp32 `[N, K]`, W - Ŵ; product: E @ H. Both are kept up to date in place.
        hessian: fp32 `[K, K]`.
        qweight: K is a multiple of its block size.
    """
    _N, K = qweight.shape
    size, levels = qweight.block_size, qweight.code[codes_of(qweight).long()]
    lattice = Lattice.of(qweight)
    stored = qweight.absmax.reshape(-1).clone()
    for begin in range(0, K, size):
        columns = slice(begin, begin + size)
        blocks = slice(begin // size, None, K // size)
        part = lattice.part(blocks)
        q = levels[:, columns]
        curvature = ((q @ hessian[columns, columns]) * q).sum(1)
        scales = part.decoded(stored[blocks])
        wanted = scales + (product[:, columns] * q).sum(1) / curvature.clamp(min=1e-30)
        candidate = part.nearest(torch.where(curvature > 0, wanted, scales))
        change = part.decoded(candidate) - scales
        worse = (part.decoded(candidate) - wanted).abs() >= (scales - wanted).abs()
        change = torch.where(worse, 0, change)
        stored[blocks] = torch.where(worse, stored[blocks], candidate)
        step = change[:, None] * q
        error[:, columns] -= step
        product.addmm_(step, hessian[columns], alpha=-1)
    return with_codes(qweight, codes_of(qweight), stored)
