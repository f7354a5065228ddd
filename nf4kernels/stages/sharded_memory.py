"""How much of a model one of several ranks holds, by the rules of FSDP2 and of DeepSpeed's ZeRO-3."""

from collections.abc import Iterable

from torch import Tensor, nn

ZERO3_LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters


def share(nbytes: int, ranks: int) -> int:
    return -(-nbytes // ranks)


def share_of_rows(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes of FSDP2's shards on the first rank, which has as many rows of each tensor as any."""
    return sum(share(each.shape[0], ranks) * (each.nbytes // max(each.shape[0], 1)) for each in tensors)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules by its bytes; an empty one where there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda layers: sum(p.nbytes for p in layers.parameters()), default=nn.ModuleList())


def layer_and_root(model: nn.Module) -> tuple[int, int]:
    """(bytes of the parameters of the largest decoder layer, of those in no layer)."""
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    return max(sizes, default=0), sum(p.nbytes for p in model.parameters()) - sum(sizes)


def gathered(model: nn.Module, layer: int, root: int, ranks: int, shard: str) -> int:
    """Bytes of other ranks' parameters that are there at once.

    FSDP2 holds the layer in use and the next, and what is in no layer throughout. ZeRO-3 holds up to
    `stage3_max_live_parameters` numbers.
    """
    if ranks == 1:
        return 0
    parameters = list(model.parameters())
    whole = sum(parameter.nbytes for parameter in parameters)
    if shard == "fsdp2":
        live = min(2 * layer + root, whole)
    else:
        numbers = sum(parameter.numel() for parameter in parameters)
        live = round(whole * min(1.0, ZERO3_LIVE / numbers))
    return live - share(live, ranks)
