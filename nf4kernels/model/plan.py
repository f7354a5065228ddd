"""Which layers of a model are replaced, why the others are not, and how one module takes another's place."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..nn.experts_layout import layout_problem, weight_names
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import QuantModule
from .heads import trained_whole
from .memory import address, nbytes, oddity, shape
from .readers import readers_of_weights
from .report import SkippedLayer
from .walk import inside, named_modules, set_submodule

QUANTIZED = (QuantLinear, QuantExperts)
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass(frozen=True)
class _Surroundings:
    """What the rest of the model says about a layer."""

    users: Mapping[int, set[str]]  # address of a parameter -> names of the parameters there
    readers: Mapping[nn.Module, str]
    trained_whole: Mapping[nn.Module, str]
    merged: Collection[nn.Module]  # PEFT's adapters are in their weights, from which it would take them out again
    block_size: int | None
    conv1d: bool


def plan_layers(
    model: nn.Module, patterns: Iterable[str], block_size: int | None = None, conv1d: bool = False
) -> tuple[list[list[str]], list[SkippedLayer]]:
    """(all names of each layer to replace, the matrices to leave alone); works on the meta device.

    A block_size of None is the codebook's own. `conv1d`: whether the caller can replace GPT-2's Conv1D, too.
    """
    names = names_of_modules(model)
    users = defaultdict(set)
    for module, (name, *_) in names.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                users[address(parameter)].add(f"{name}.{leaf}" if name else leaf)
    wrappers: list[Any] = [module for module in names if getattr(module, "merged_adapters", None)]
    merged = {each for wrapper in wrappers for each in getattr(wrapper, "base_layer", nn.Module()).modules()}
    surroundings = _Surroundings(users, readers_of_weights(names), trained_whole(names), merged, block_size, conv1d)

    targets, skipped = [], []
    for module, aliases in names.items():
        reason = _reason(module, aliases, patterns, surroundings)
        if reason is None:
            targets.append(aliases)
        elif isinstance(module, QUANTIZED):
            for part, leaf in zip(parts(module), [""] if isinstance(module, QuantLinear) else weight_names(module)):
                name = f"{aliases[0]}.{leaf}".strip(".")
                skipped.append(SkippedLayer(name, part.weight_shape, part.weight.nbytes, reason))
        else:
            for leaf, matrix in module._parameters.items():
                if matrix is not None and (oddity(matrix) or matrix.dim() >= 2):
                    name = aliases[0] if leaf == "weight" else f"{aliases[0]}.{leaf}".lstrip(".")
                    skipped.append(SkippedLayer(name, shape(matrix), nbytes(matrix), reason))
    return targets, skipped


def unmatched(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Those of the patterns that stand for nothing in the model."""
    names = [name for aliases in names_of_modules(model).values() for name in aliases]
    names += [f"{name}.{leaf}" for name, module in named_modules(model) for leaf, _ in module._parameters.items()]
    return [pattern for pattern in patterns if not any(skips(pattern, name) for name in names)]


def check_skip(model: nn.Module, skip: Iterable[str], who: str) -> None:
    """ValueError where an entry of skip stands for nothing in the model."""
    for pattern in unmatched(model, skip):
        raise ValueError(f"{who}: skip must match a layer, got {pattern!r}")


def skips(pattern: str, name: str) -> bool:
    """Whether an entry of `quantize_model`'s skip stands for the layer of that full name."""
    return f".{pattern}." in f".{name}." or fnmatchcase(name, pattern)


def _reason(module: nn.Module, aliases: list[str], patterns: Iterable[str], surroundings: _Surroundings) -> str | None:
    """Why a module is left alone; None for a layer to replace."""
    if isinstance(module, QUANTIZED):
        return f"already a {type(module).__name__}"
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
        return "parametrized"
    for parameter in module._parameters.values():
        if parameter is not None and (odd := oddity(parameter)):
            return f"its parameter is {odd}"
    if type(module) is not nn.Linear:
        reason = _reason_for_other(module, surroundings)
        if reason is not None:
            return reason
    is_linear = isinstance(module, nn.Linear) or is_conv1d(module)
    leaves = ("weight",) if is_linear else weight_names(module)
    for name in aliases:
        known_as = [name] if is_linear else [name, *(f"{name}.{leaf}" for leaf in leaves)]
        for pattern in patterns:
            if any(skips(pattern, each) for each in known_as):
                return f"skip={pattern!r}"
        if {"lora_A", "lora_B"} & set(name.split(".")):
            return "a LoRA factor"
    if module._parameters.get(leaves[0]) is None:
        return "its weight is computed by a hook"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if module in surroundings.merged:
        return "PEFT has merged adapters into it: unmerge_adapter() or merge_and_unload() first"
    if module in surroundings.trained_whole:
        return surroundings.trained_whole[module]
    if module in surroundings.readers:
        return f"{surroundings.readers[module]} reads its weight"
    for leaf in leaves:
        parameter = module._parameters[leaf]
        others = (
            set()
            if parameter is None
            else surroundings.users[address(parameter)] - {f"{name}.{leaf}".lstrip(".") for name in aliases}
        )
        if others:
            return f"tied to {min(others)}"
    return None


def _reason_for_other(module: nn.Module, surroundings: _Surroundings) -> str | None:
    """Why a module that is no nn.Linear is left alone; None for experts to replace, and for Conv1D where it may be."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if is_conv1d(module):
        return None if surroundings.conv1d else "Conv1D keeps its weight as [in, out]"
    if isinstance(module, nn.Linear):
        return f"{kind}, a subclass of nn.Linear"
    if any(p is not None and p.dim() == 3 for p in module._parameters.values()):
        return layout_problem(module, surroundings.block_size)
    return f"{kind}, not an nn.Linear"


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer whose weight is [in, out], as GPT-2 has them."""
    return type(module).__name__ == "Conv1D"


def linear_shape(layer: Any) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear, QuantLinear or Conv1D."""
    return (layer.nf, layer.nx) if is_conv1d(layer) else (layer.out_features, layer.in_features)


def names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """module -> all its names; nothing below a layer in 4 bits."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    within: str | tuple[str, ...] = ()
    for name, module in named_modules(model):
        if within and name.startswith(within):
            continue
        names[module].append(name)
        if isinstance(module, QUANTIZED):
            within = f"{name}."
    return names


def parts(layer: QuantLinear | QuantExperts) -> list[QuantModule]:
    return [layer] if isinstance(layer, QuantLinear) else [getattr(layer, name) for name in layer.weights]


def unwrapped(model: nn.Module, argument: str, who: str) -> nn.Module:
    """The module inside torch.compile's; TypeError for what is no module, ValueError for one inside DDP."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: {argument} must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"{who}: {argument} must be the module inside, pass .module, got {type(model).__name__}")
    return inside(model)


def check_container(model: nn.Module, argument: str, who: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: {argument} must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"{who}: {argument} must contain its layers, got a {type(model).__name__} itself"
            " (QuantLinear.from_linear and QuantLinear.to_linear convert one)"
        )
    if isinstance(model, QuantExperts) or layout_problem(model) is None:
        raise ValueError(
            f"{who}: {argument} must contain its layers, got a {type(model).__name__} itself"
            " (QuantExperts.from_experts and QuantExperts.to_experts convert one)"
        )


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Of forward and backward; a state's hooks are of its tensors' names, which are others."""
    for hooks in HOOKS:
        setattr(new, hooks, getattr(old, hooks))


def replace_module(model: nn.Module, names: Iterable[str], old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every one of `names`, with old's hooks."""
    move_hooks(old, new)
    for name in names:
        set_submodule(model, name, new)
