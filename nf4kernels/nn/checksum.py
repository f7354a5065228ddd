"""A checksum of packed bytes, on their own device: what tells codes that were written on purpose from others."""

import torch
from torch import Tensor

LENGTH = 8  # bytes
ROW = 256  # words of 8 bytes


def checksum(packed: Tensor, absmax: Tensor) -> Tensor:
    """uint8 `[8]`: of the packed codes, and of absmax where that holds codes, too. All zeros stands for unknown.

    Sums of 64-bit words over rows and over columns, each weighted by its place: two reads of the bytes and no copy of
    them; exchanged rows show, and any change of one word (its weight is odd).
    """
    total = _weighted_sum(packed)
    if absmax.dtype == torch.uint8:
        total = total * 31 + _weighted_sum(absmax)
    return total.view(1).view(torch.uint8)


def _weighted_sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.storage_offset() % 8:  # words must be aligned
        flat = flat.clone()
    whole = flat.numel() - flat.numel() % (8 * ROW)
    words, rest = flat[:whole].view(torch.int64).view(-1, ROW), flat[whole:].long()
    return _by_place(words.sum(1)) + 2 * _by_place(words.sum(0)) + 5 * _by_place(rest)


def _by_place(values: Tensor) -> Tensor:
    return (values * (2 * torch.arange(values.numel(), device=values.device) + 1)).sum()
