"""Whole heads, MLP channels and blocks cut out of a model: its layers really shrink."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...model.walk import get_submodule, inside, named_modules, set_submodule
from ...nn.quant_linear import QuantLinear

UNITS = ("heads", "channels", "layers")
MULTIPLE = 64  # of the channels that stay, so that rows of the last layer are whole blocks
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
# Names of each role within a block, in the order in which they are looked for.
NAMES: Mapping[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "wq"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "o": ("o_proj", "out_proj", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1"),
    "down": ("down_proj", "w2", "fc2"),
}
COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "heads", "n_heads")


@dataclass(frozen=True)
class Structure:
    """Where a model's blocks have their heads and channels, and how many there were before anything was pruned.

    Attributes:
        stack: the name of the nn.ModuleList of blocks.
        names: role -> name within a block: q, k, v, o of attention; gate (none without a gate), up, down of the MLP. A
            role that is left out is not pruned.
        heads, kv_heads: query heads and those of keys and values of a block. A kv head and the heads / kv_heads query
            heads that read it are pruned together, so that every group stays whole.
        width: rows of k for each kv head.
        channels: rows of up.
        blocks: how many blocks there are.
        counts: attributes within a block, as "attention.heads", that hold a number of heads which its forward reads;
            they are set to what is left.

    Shares are of these counts, so that pruning again at the same share changes nothing.
    """

    stack: str
    names: Mapping[str, str]
    heads: int
    kv_heads: int
    width: int
    channels: int
    blocks: int
    counts: Sequence[str] = field(default=())

    def of_block(self, model: nn.Module, index: int) -> dict[str, nn.Linear]:
        """role -> layer."""
        block = self.stack_of(model)[index]
        return {role: get_submodule(block, name) for role, name in self.names.items()}  # type: ignore[misc]

    def stack_of(self, model: nn.Module) -> nn.ModuleList:
        return get_submodule(model, self.stack)  # type: ignore[return-value]  # checked when it was found

    @property
    def group(self) -> int:
        """Query heads for each kv head."""
        return self.heads // self.kv_heads


def find_structure(model: nn.Module, heads: int, kv_heads: int | None = None) -> Structure:
    """The structure of a model of equal blocks in one nn.ModuleList, by the usual names of their layers (`NAMES`).

    Raises:
        ValueError: there is no such list, its blocks differ, a role is missing (fused q, k and v, or gate and up, are
            not taken), or a width does not fit the number of heads.
    """
    who = "nf4kernels.recover.find_structure"
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{who}: heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    model = inside(model)
    stacks = [(name, each) for name, each in named_modules(model) if isinstance(each, nn.ModuleList) and len(each)]
    found = [(name, roles) for name, each in stacks if {"up", "down", "o"} <= set(roles := _roles(inside(each[0])))]
    if not found:
        raise ValueError(
            f"{who}: model must have an nn.ModuleList of blocks with layers named as q_proj, k_proj, v_proj, o_proj,"
            f" up_proj and down_proj, got {', '.join(name for name, _ in stacks) or 'no nn.ModuleList'}; describe it"
            " by a Structure"
        )
    stack, names = found[0]
    missing = [role for role in ROLES if role not in names and role != "gate"]
    if missing:
        raise ValueError(f"{who}: a block of {stack} must have the layers {', '.join(missing)}, got {names}")
    first = get_submodule(model, f"{stack}.0")
    counts = [
        f"{name}.{each}".lstrip(".")
        for name, module in named_modules(first)
        for each in COUNTS
        if isinstance(getattr(module, each, None), int)
    ]
    layers: dict[str, Any] = {role: get_submodule(first, names[role]) for role in ("k", "up")}
    width, rest = divmod(layers["k"].out_features, kv_heads)
    if rest:
        raise ValueError(f"{who}: kv_heads must divide the rows of k, got {kv_heads} and {layers['k'].out_features}")
    blocks: Any = get_submodule(model, stack)
    structure = Structure(stack, names, heads, kv_heads, width, layers["up"].out_features, len(blocks), tuple(counts))
    check_structure(model, structure, who)
    return structure


def _roles(block: nn.Module) -> dict[str, str]:
    linear = [name for name, each in named_modules(block) if isinstance(each, nn.Linear)]
    found = {}
    for role, usual in NAMES.items():
        matches = [name for each in usual for name in linear if name.rpartition(".")[2] == each]
        if matches:
            found[role] = matches[0]
    return found


def check_structure(model: nn.Module, structure: Structure, who: str) -> None:
    """ValueError where a block lacks a layer, or widths do not fit the heads and each other, or blocks differ."""
    stack = structure.stack_of(model)
    widths: dict[str, tuple[int, int]] = {}
    for index in range(len(stack)):
        try:
            layers = structure.of_block(model, index)
        except AttributeError as error:
            raise ValueError(f"{who}: block {structure.stack}.{index} must have every layer, got {error}") from None
        for role, layer in layers.items():
            shape = layer.out_features, layer.in_features
            if widths.setdefault(role, shape) != shape:
                raise ValueError(
                    f"{who}: blocks must be alike, got {role} of {structure.stack}.{index} with {list(shape)} beside"
                    f" {list(widths[role])}"
                )
    if {"q", "k", "v", "o"} <= set(widths):
        q, k, v, o = widths["q"][0], widths["k"][0], widths["v"][0], widths["o"][1]
        if k != v or q != o or k % structure.width or q != k * structure.group:
            raise ValueError(
                f"{who}: q, k, v and o must fit {structure.heads} heads for {structure.kv_heads} kv heads of width"
                f" {structure.width}, got widths {q}, {k}, {v} and {o}"
            )
    if "up" in widths and widths["up"][0] != widths["down"][1]:
        raise ValueError(f"{who}: down must read what up gives, got {widths['down'][1]} beside {widths['up'][0]}")


def check_dense(model: nn.Module, structure: Structure, roles: Sequence[str], who: str) -> None:
    """ValueError where a layer that is to be cut is in 4 bits or no plain nn.Linear."""
    for index in range(len(structure.stack_of(model))):
        for role, layer in structure.of_block(model, index).items():
            if role in roles and (type(layer) is not nn.Linear or layer.weight.is_meta):
                came = "a layer in 4 bits" if isinstance(layer, QuantLinear) else type(layer).__name__
                raise ValueError(
                    f"{who}: {structure.stack}.{index}.{structure.names[role]} must be a loaded nn.Linear, got {came}:"
                    " prune first and quantize then"
                )


def kept_count(unit: str, share: float, structure: Structure, multiple: int, who: str) -> int:
    """How many kv groups, channels or blocks stay in (each block of) a model, at least one.

    Channels are the nearest multiple of `multiple` to (1 - share) of them; what is no whole number is rounded to the
    nearest, half away from what is pruned.
    """
    if unit not in UNITS:
        raise ValueError(f"{who}: unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if not 0 <= share < 1:
        raise ValueError(f"{who}: share must be in [0, 1), got {share}")
    whole = {"heads": structure.kv_heads, "channels": structure.channels, "layers": structure.blocks}[unit]
    step = multiple if unit == "channels" else 1
    if unit == "channels" and (multiple < 1 or whole < multiple):
        raise ValueError(f"{who}: multiple must be from 1 to the {whole} channels, got {multiple}")
    if share == 0:
        return whole
    return min(whole, max(step, int((1 - share) * whole / step + 0.5) * step))


@torch.no_grad()
def cut(model: nn.Module, structure: Structure, unit: str, kept: Sequence[Tensor]) -> None:
    """Leave in each block the kv groups or channels of `kept`, or of the model the blocks; nothing is checked.

    Args:
        kept: int64, ascending: one tensor a block, or with "layers" one alone.
    """
    stack = structure.stack_of(model)
    if unit == "layers":
        stay = [stack[int(index)] for index in kept[0]]
        del stack[:]
        stack.extend(stay)
        return
    for index, chosen in enumerate(kept):
        layers = structure.of_block(model, index)
        block = stack[index]
        if unit == "channels":
            rows = {"gate": chosen, "up": chosen}
            columns = {"down": chosen}
        else:
            kv = _elements(chosen, structure.width)
            query = _elements(chosen, structure.width * structure.group)
            rows = {"q": query, "k": kv, "v": kv}
            columns = {"o": query}
            _set_counts(block, structure, len(chosen))
        for role, layer in layers.items():
            if role in rows:
                set_submodule(block, structure.names[role], shrunk(layer, rows[role], 0))
            elif role in columns:
                set_submodule(block, structure.names[role], shrunk(layer, columns[role], 1))


def shrunk(layer: nn.Linear, kept: Tensor, dim: int) -> nn.Linear:
    """A new layer of those rows (0, with their biases) or columns (1); dtype, device and what trains are kept."""
    index = kept.to(layer.weight.device)
    weight = layer.weight.detach().index_select(dim, index)
    new = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = layer.bias.detach().index_select(0, index) if dim == 0 else layer.bias.detach().clone()
        new.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    return new.train(layer.training)


def units_in(model: nn.Module, structure: Structure, unit: str) -> int:
    """How many kv groups or channels each block has now, or how many blocks the model has."""
    if unit == "layers":
        return len(structure.stack_of(model))
    layers = structure.of_block(model, 0)
    return layers["up"].out_features if unit == "channels" else layers["k"].out_features // structure.width


def _elements(heads: Tensor, width: int) -> Tensor:
    """The rows of those heads, `width` rows each."""
    return (heads[:, None] * width + torch.arange(width)).reshape(-1)


def _set_counts(block: nn.Module, structure: Structure, groups: int) -> None:
    for path in structure.counts:
        parent, _, name = path.rpartition(".")
        is_kv = "kv" in name or "key_value" in name
        setattr(get_submodule(block, parent), name, groups if is_kv else groups * structure.group)
