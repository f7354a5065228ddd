"""Whether a file's tensors are a model's: by what names, and in which shapes."""

from typing import Any

from torch import Tensor, nn

from ..model.plan import linear_shape
from ..nn.casts import check_cast
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import QuantModule
from .model_state import dense_state, join, quant_layers, shared
from .names import Fit, fit_of_whole, renamed_head


def rename(model: nn.Module, tensors: dict[str, Tensor], qweights: dict[str, Any],
            metadata: dict[str, Any]) -> tuple[Fit, list[str]]:  # fmt: skip
    """Give all three the model's names, in place; (how, the names of tensors that have none)."""
    layers = quant_layers(model)
    aliases: dict[QuantLinear, list[str]] = {}
    for name, layer in layers.items():
        aliases.setdefault(layer, []).append(join(name, "weight"))
    groups = [*shared(dense_state(model, layers)), *aliases.values()]
    of_adapters = {key for layer, adapters in metadata.items() for each in adapters for key in each.keys(layer)}
    fit = fit_of_whole({*tensors, *(join(name, "weight") for name in qweights)} - of_adapters, groups)
    outside: list[str] = []
    for store in (tensors, qweights, metadata):
        named: Any = store  # three kinds of values
        values = {(fit(name), name): named.pop(name) for name in list(named)}
        named.update({name: value for (name, _), value in values.items() if name is not None})
        outside += [old for name, old in values if name is None]
    of_adapters = {key for layer, adapters in metadata.items() for each in adapters for key in each.keys(layer)}
    head = renamed_head(model, {*tensors, *(join(name, "weight") for name in qweights)} - of_adapters, groups)
    if head is not None:
        theirs, ours = head
        for store in (tensors, qweights, metadata):
            named = store
            for name in [name for name in named if f"{name}.".startswith(f"{theirs}.")]:
                named[ours + name[len(theirs) :]] = named.pop(name)
    return fit, outside


def check_dense(expected, tensors, layers, missing_lora, fit: Fit, who: str) -> list[str]:
    """ValueError unless `tensors` are those of `expected` (one of each shared group) and of the adapters to attach.

    Returns the names that a file of a part of the model does not hold.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, adapters in missing_lora.items():
        if name not in layers:
            raise ValueError(f"{who}: model must have a 4-bit layer {name} for its adapter, got none")
        for adapter in adapters:
            layer, r = layers[name], adapter.config.r
            *experts, N, K = layer.weight_shape if isinstance(layer, QuantModule) else linear_shape(layer)
            factors = (*experts, r, K), (*experts, N, r)
            shapes.update(zip(adapter.keys(name), factors * 2))
    missing = [name for name in shapes if name not in tensors]
    left: list[str] = []
    for group in shared(expected):
        shapes.update({name: tuple(expected[name].shape) for name in group})
        if not any(name in tensors for name in group):
            (missing if group[0].startswith(fit.added) else left).append(group[0])
    unknown = [name for name in tensors if name not in shapes]
    if missing or unknown:
        raise ValueError(f"{who}: the checkpoint must have the model's names, missing {missing}, unknown {unknown}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{who}: {name} must have shape {list(shapes[name])}, got {list(tensor.shape)}")
        if name in expected and not expected[name].is_meta:
            check_cast(tensor, expected[name].dtype, f"{who}: {name}")
    return left
