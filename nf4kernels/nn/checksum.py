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
    return of_sums(_weighted_sum(packed), _weighted_sum(absmax) if absmax.dtype == torch.uint8 else None)


def of_sums(packed: Tensor, absmax: Tensor | None = None) -> Tensor:
    """The checksum of bytes whose weighted sums, int64 scalars, are known; `absmax` where that holds codes."""
    total = packed if absmax is None else packed * 31 + absmax
    return total.view(1).view(torch.uint8)


def sum_of_part(part: Tensor, first: int, size: int) -> Tensor:
    """What bytes `first` and on of a tensor of `size` bytes add to its weighted sum: parts' sums add up to it."""
    flat = part.detach().reshape(-1)
    whole = size - size % (8 * ROW)
    words, rest = flat[: max(whole - first, 0)], flat[max(whole - first, 0) :]
    row, lead = divmod(first, 8 * ROW)
    padded = flat.new_zeros(-(-(lead + words.numel()) // (8 * ROW)) * 8 * ROW)
    padded[lead : lead + words.numel()] = words
    rows = padded.view(torch.int64).view(-1, ROW)
    return _by_place(rows.sum(1), row) + 2 * _by_place(rows.sum(0)) + 5 * _by_place(rest.long(), max(first - whole, 0))


def _weighted_sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.storage_offset() % 8:  # words must be aligned
        flat = flat.clone()
    whole = flat.numel() - flat.numel() % (8 * ROW)
    words, rest = flat[:whole].view(torch.int64).view(-1, ROW), flat[whole:].long()
    return _by_place(words.sum(1)) + 2 * _by_place(words.sum(0)) + 5 * _by_place(rest)


def _by_place(values: Tensor, first: int = 0) -> Tensor:
    places = torch.arange(first, first + values.numel(), device=values.device)
    return (values * (2 * places + 1)).sum()
