"""How much of a model one of several ranks holds, by the rules of FSDP2 and of DeepSpeed's ZeRO-3."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ZERO3_LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters


def share(nbytes: int, ranks: int) -> int:
    return -(-nbytes // ranks)


def numbers_here(tensor: Tensor, ranks: int) -> int:
    """How many of its numbers FSDP2 leaves on the first rank, which has as many rows as any."""
    return share(tensor.shape[0], ranks) * math.prod(tensor.shape[1:])


def bytes_here(tensors: Sequence[Tensor], ranks: int, shard: str) -> int:
    """Of the parameters that a rank has for good."""
    if shard == "zero3":
        return share(sum(each.nbytes for each in tensors), ranks)
    return sum(numbers_here(each, ranks) * each.itemsize for each in tensors)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules by its bytes; an empty one where there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda layers: sum(p.nbytes for p in layers.parameters()), default=nn.ModuleList())


@dataclass(frozen=True)
class Gathered:
    """Bytes of the parameters that are gathered from all ranks, beside those that the rank has for good.

    Attributes:
        working: while layers are at work.
        opening: while a layer is gathered in the forward pass.
    """

    working: int
    opening: int


def gathered(
    model: nn.Module, ranks: int, shard: str, reshard_after_forward: bool = True, dtype: torch.dtype | None = None
) -> Gathered:
    """What is gathered at once under FSDP2, as `fully_shard` of every decoder layer and then of the rest, or ZeRO-3.

    FSDP2 gathers into one buffer, whose rows it then copies into the parameters. It has the layer in use (or all that
    were, with `reshard_after_forward` off), the next one's buffer, and throughout what is in no layer. While a layer is
    copied, the buffer of what was gathered before it still stands, be that the layer before or what is in none. Rows
    are filled up to a multiple of `ranks`. ZeRO-3 holds up to `stage3_max_live_parameters` numbers.

    Args:
        dtype: what floating parameters are cast to before they are gathered; None leaves them as they are.
    """
    if ranks == 1:
        return Gathered(0, 0)
    parameters = list(model.parameters())
    if shard == "zero3":
        whole, numbers = (sum(of(each) for each in parameters) for of in (lambda p: p.nbytes, lambda p: p.numel()))
        live = round(whole * min(1.0, ZERO3_LIVE / numbers))
        return Gathered(live - share(live, ranks), 0)

    def whole_rows(tensors: Iterable[Tensor]) -> int:
        return sum(
            ranks * numbers_here(each, ranks) * (dtype if dtype and each.is_floating_point() else each.dtype).itemsize
            for each in tensors
        )

    layers = decoder_layers(model)
    in_layers = {id(parameter) for parameter in layers.parameters()}
    sizes = [whole_rows(layer.parameters()) for layer in layers]
    largest = max(sizes, default=0)
    root = whole_rows(each for each in parameters if id(each) not in in_layers)
    held = largest if reshard_after_forward else sum(sizes)
    return Gathered(root + largest + held, root + 2 * largest + max(root, held))
