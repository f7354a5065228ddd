"""Which weights stay, by their scores, and zeros in the places of the others: in dense weights and in 4-bit codes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...model.walk import get_submodule
from ...nn.quant_linear import QuantLinear
from ...quantized_weight import QuantizedWeight

Masks = Mapping[str, Tensor]  # layer -> bool [N, K], True where the weight stays
WHO = "nf4kernels.recover.apply_masks"


def ranked(scores: Tensor, weight: Tensor) -> Tensor:
    """The scores with those of weights that are zero below all others: what is pruned is pruned again first."""
    return torch.where(weight == 0, -1.0, scores)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """bool `[N, K]`: of each m consecutive columns the n with the largest scores; K is a multiple of m."""
    return _keep(scores.reshape(-1, m), m - n).reshape(scores.shape)


def keep_by_row(scores: Tensor, share: float) -> Tensor:
    """bool `[N, K]`: all but the round(share * K) smallest scores of each row."""
    return _keep(scores, round(share * scores.shape[1]))


def keep_by_layer(scores: Tensor, share: float) -> Tensor:
    """bool `[N, K]`: all but the round(share * N * K) smallest scores."""
    return _keep(scores.reshape(1, -1), round(share * scores.numel())).reshape(scores.shape)


def _keep(scores: Tensor, count: int) -> Tensor:
    """bool `[R, C]`: all but the `count` smallest of each row; of equal ones the first are left out."""
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=1, keepdim=True).values
    below, ties = scores < limit, scores == limit
    wanted = count - below.sum(1, keepdim=True)
    return ~(below | (ties & (ties.cumsum(1, dtype=torch.int32) <= wanted)))


def keep_by_model(scores: Callable[[], Iterable[tuple[str, Tensor]]], share: float) -> Iterable[tuple[str, Tensor]]:
    """(name, bool `[N, K]`): all but the round(share * all) smallest scores of all layers together.

    The exact limit is found by two histograms of the scores' bits, so that one layer's scores are in memory at a time;
    `scores()` gives them three times. Of equal ones the first are left out.
    """
    high = sum((_counts(_key(each) >> 16) for _, each in scores()), torch.zeros(2**16, dtype=torch.long))
    count = round(share * int(high.sum()))
    if count == 0:
        for name, each in scores():
            yield name, torch.ones_like(each, dtype=torch.bool)
        return
    upper, before = _bin(high, count)
    low = torch.zeros(2**16, dtype=torch.long)
    for _, each in scores():
        key = _key(each)
        low += _counts(key[key >> 16 == upper] & 0xFFFF)
    lower, within = _bin(low, count - before)
    limit, wanted = (upper << 16) + lower, count - before - within
    for name, each in scores():
        key = _key(each)
        ties = key == limit
        chosen = ties & (ties.reshape(-1).cumsum(0).reshape(ties.shape) <= wanted)
        wanted -= int(chosen.sum())
        yield name, ~((key < limit) | chosen)


def _key(scores: Tensor) -> Tensor:
    """int64 in [0, 2^31], ordered as the scores, which are -1 or not negative: their bits."""
    return torch.where(scores < 0, 0, scores.contiguous().view(torch.int32).long() + 1)


def _counts(values: Tensor) -> Tensor:
    return torch.bincount(values.reshape(-1), minlength=2**16).cpu()


def _bin(counts: Tensor, count: int) -> tuple[int, int]:
    """(the bin in which the count-th value is, how many are in the bins before it)."""
    sums = counts.cumsum(0)
    index = int(torch.searchsorted(sums, count))
    return index, int(sums[index] - counts[index])


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set the weights that `masks` leaves out to zero, in place: W of nn.Linear, codes of QuantLinear.

    A QuantLinear keeps its format, scales and all other codes; the pruned ones become the code of 0, which decodes to
    zero. Adapters are left alone: their product is dense.

    Args:
        masks: layer -> bool `[N, K]`, True where the weight stays.

    Raises:
        ValueError: a name is none of a layer, a mask has another shape, or a layer's codebook has no level that is
            zero; nothing is changed.
    """
    layers = {name: checked_layer(model, name, mask, WHO) for name, mask in masks.items()}
    for name, layer in layers.items():
        mask = masks[name].to(layer.weight.device)
        if isinstance(layer, QuantLinear):
            layer.set_qweight(masked_codes(layer.qweight, mask))
        else:
            layer.weight.masked_fill_(~mask, 0)


def masked_codes(qweight: QuantizedWeight, mask: Tensor) -> QuantizedWeight:
    """The weight with the code of 0 where bool `[N, K]` is False; scales and other codes are as they were.

    Raises:
        ValueError: no level of its codebook is zero.
    """
    zero = zero_code(qweight)
    if qweight.column_order is not None:
        mask = mask[:, qweight.column_order.long()]
    if qweight.bits == 8:
        return replace(qweight, packed=qweight.packed.masked_fill(~mask, zero))
    flat, kept = qweight.packed.reshape(-1), mask.reshape(-1)
    if kept.numel() % 2:
        kept = torch.cat([kept, kept.new_ones(1)])  # the odd tail nibble is a code of 0
    high = torch.where(kept[0::2], flat >> 4, zero)
    low = torch.where(kept[1::2], flat & 15, zero)
    return replace(qweight, packed=((high << 4) | low).to(torch.uint8).reshape(qweight.packed.shape))


def zero_code(qweight: QuantizedWeight) -> int:
    """The lowest code that decodes to exactly 0; ValueError where the codebook has none (iq4_nl, some custom ones)."""
    codes = (qweight.code == 0).nonzero()
    if not len(codes):
        nearest = qweight.code[qweight.code.abs().argmin()].item()
        raise ValueError(
            f"{WHO}: a codebook must have a level that is exactly 0 for pruned weights, got {qweight.codebook} whose"
            f" nearest is {nearest}"
        )
    return int(codes[0])


def checked_layer(model: nn.Module, name: str, mask: Tensor | None, who: str) -> Any:
    """The layer of that name; ValueError where it is none, or the mask does not fit it, or it cannot hold zeros."""
    try:
        layer: Any = get_submodule(model, name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{who}: masks must name layers nn.Linear or QuantLinear, got {name!r}")
    shape = (layer.out_features, layer.in_features)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
        raise ValueError(f"{who}: the mask of {name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    if isinstance(layer, QuantLinear):
        zero_code(layer.qweight)
    return layer
