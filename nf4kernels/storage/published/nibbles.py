"""Codes in bytes: from the order of published files to ours, the even element in the high nibble, and column orders."""

import torch
from torch import Tensor

from ...quantized_weight import BLOCK_SIZES


def swapped(packed: Tensor) -> Tensor:
    """uint8 with the two nibbles of each byte exchanged; its own inverse. Most formats have the even element low."""
    return (packed << 4) | (packed >> 4)


def bytes_of_words(words: Tensor) -> Tensor:
    """int32 `[N, W]`, eight codes a word from its low bits on, as ours: uint8 `[N, 4 * W]`."""
    return swapped(words.contiguous().view(torch.uint8))


def halves_interleaved(packed: Tensor) -> Tensor:
    """uint8 `[..., 16]`, ggml's block of 32 with element j low and element j + 16 high in byte j, as ours."""
    low, high = packed & 15, packed & 240
    first = low[..., 0::2] << 4 | low[..., 1::2]
    second = high[..., 0::2] | high[..., 1::2] >> 4
    return torch.cat([first, second], -1)


def columns_taken(packed: Tensor, order: Tensor) -> Tensor:
    """uint8 `[N, K/2]` of ours whose column j is the given one's column order[j]."""
    columns = torch.stack([packed >> 4, packed & 15], -1).flatten(-2)[:, order.long()]
    return columns[:, 0::2] << 4 | columns[:, 1::2]


def order_of_groups(group_of_column: Tensor, group_size: int, name: str) -> Tensor | None:
    """int32 `[K]`: the columns group by group, of int `[K]`; None where they stand so already.

    ValueError unless every group but the last has group_size columns.
    """
    K = group_of_column.numel()
    groups = group_of_column.long()
    expected = torch.arange(K) // group_size
    if torch.equal(groups.cpu(), expected):
        return None
    order = groups.cpu().argsort(stable=True)
    if not torch.equal(groups.cpu()[order], expected):
        raise ValueError(f"{name} must give each group {group_size} columns, got other counts")
    return order.int()


def scales_of_blocks(scales: Tensor, K: int, group_size: int, name: str) -> tuple[Tensor, int]:
    """(`[N, K/block]`, block): scales `[N, groups]` repeated for blocks of the largest power of two that fits both.

    A group of 128 is one block; a group of 96 is three of 32, and a row of 11008 is 43 of 256. ValueError where no
    block of 16 or more fits.
    """
    block_size = next((size for size in reversed(BLOCK_SIZES) if group_size % size == 0 and K % size == 0), 0)
    if not block_size:
        raise ValueError(f"{name} must be of groups that blocks of 16 fit, got groups of {group_size} in rows of {K}")
    repeated = scales.repeat_interleave(group_size // block_size, 1)[:, : K // block_size]
    return repeated.contiguous(), block_size


def check_finite(scales: Tensor, name: str) -> None:
    """ValueError for NaN or inf among scales in floating point; nothing is known of a tensor on meta."""
    if not scales.is_meta and scales.numel() and not all(bound.isfinite() for bound in scales.aminmax()):
        raise ValueError(f"{name} must be finite, got NaN or inf")
