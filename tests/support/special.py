"""Blocks on which encoders disagree, and weights made of them."""

import torch
from torch import Tensor

FINITE_BLOCKS = {
    "zero": torch.zeros(64),
    "negative-zero": torch.full((64,), -0.0),
    "denormal": torch.linspace(-1e-40, 1e-40, 64),
    "one-denormal": torch.cat([torch.zeros(63), torch.tensor([1.4e-45])]),
    "smallest-normal": torch.linspace(-(2.0**-126), 2.0**-126, 64),
    "huge": torch.linspace(-1e38, 1e38, 64),
    "largest-float": torch.linspace(-1, 1, 64) * torch.finfo(torch.float32).max,  # its inverse is denormal
    "constant": torch.full((64,), 0.3),
    "negative-peak": torch.cat([torch.tensor([-5.0]), torch.linspace(-0.4, 0.4, 63)]),
    "one-spike": torch.cat([torch.full((63,), 1e-6), torch.tensor([1e6])]),
}


def special_weight(columns: int, names=tuple(FINITE_BLOCKS)) -> Tensor:
    """[rows, columns] whose flat order runs through the blocks in turn, an ordinary one between any two."""
    ordinary = torch.randn(64, generator=torch.Generator().manual_seed(3))
    flat = torch.cat([torch.cat([FINITE_BLOCKS[name], ordinary]) for name in names])
    rows = -(-flat.numel() // columns)
    return torch.cat([flat, flat])[: rows * columns].view(rows, columns)


def ties(code: Tensor, block_size: int) -> Tensor:
    """[2, K]: every midpoint of the codebook, the floats beside it and the levels; scaled by 1 and 2 (exact)."""
    levels = code.sort().values
    midpoints = (levels[:-1] + levels[1:]) / 2
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    below = torch.nextafter(midpoints, torch.tensor(-2.0))
    values = torch.cat([torch.ones(1), midpoints, above, below, levels])  # 1 first: the block's absmax is 1
    K = -(-values.numel() // block_size) * block_size
    row = torch.zeros(K).index_copy(0, torch.arange(values.numel()), values)
    row[::block_size] = 1
    return torch.stack([row, 2 * row])


def scale_ties(scale_code: Tensor, peak: float) -> Tensor:
    """fp32 absmax, superblock after superblock: every midpoint of `peak * scale_code`, then the floats beside it.

    A value is followed by its negative, so that the mean is exactly 0, and each superblock holds `peak`, so that the
    op's division is exact. (The op has no need of an absmax to be positive.)
    """
    levels = (scale_code * peak).sort().values
    midpoints = ((levels[:-1] + levels[1:]) / 2).unique()
    midpoints = midpoints[midpoints > 0]
    superblocks = []
    for values in (
        midpoints,
        torch.nextafter(midpoints, torch.tensor(2 * peak)),
        torch.nextafter(midpoints, torch.tensor(0.0)),
    ):
        for part in values.split(127):
            padded = torch.cat([torch.full((128 - len(part),), peak), part])
            superblocks.append(torch.stack([padded, -padded], 1).view(-1))
    return torch.cat(superblocks)


def groups_at_a_tie() -> list[Tensor]:
    """[4] absmax each, of bf16 weights, whose e4m3 bytes depend on whether 448 / s is rounded once or twice.

    In few blocks of bf16 weights absmax and their mean have few bits, so that a product often falls on a tie: about one
    group in 800.
    """
    weights = torch.randn(10_000, 4, 64, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    absmax = weights.abs().amax(-1).float()
    centred = absmax - absmax.double().mean(1, keepdim=True).float()
    s = centred.abs().amax(1, keepdim=True)
    factors = s.new_tensor(448) / s, s.reciprocal() * 448
    once, twice = ((centred * factor).to(torch.float8_e4m3fn).view(torch.uint8) for factor in factors)
    return list(absmax[(once != twice).any(1)])
