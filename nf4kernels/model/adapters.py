"""The adapters of a whole model: switched off and on, chosen among several by name, removed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..nn.adapted_module import AdaptedModule


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block every layer of `model` in 4 bits is x @ Ŵ.T + bias, to the bit; after it, what it was.

    So DPO's reference model is the model itself. State, parameters and `requires_grad` stay as they are, blocks may be
    nested, and an error ends a block as it ends any. What was trained beside the adapters stays trained. The switch is
    the model's, not the thread's; a checkpointed forward inside the block must have its backward inside, too, since
    that computes it again.

    Args:
        model: any module, compiled or inside DDP as well, or a QuantLinear.

    Raises:
        TypeError: model is not a module.
    """
    before = [(layer, layer.adapters_off) for layer in _layers(model, "nf4kernels.disable_adapters")]
    try:
        for layer, _ in before:
            layer.adapters_off = True
        yield
    finally:
        for layer, off in before:
            layer.adapters_off = off


def set_adapter(model: nn.Module, name: str) -> None:
    """Make the adapters of that name the active ones of `model`, and trainable; all others wait, frozen.

    A layer without an adapter of that name has no active one then. Nothing is copied, so an optimizer over the
    parameters of several adapters keeps its state.

    Args:
        model: any module with layers in 4 bits (experts, too), or one of them.
        name: as `QuantLinear.add_lora` or `load_adapters` was given.

    Raises:
        TypeError, ValueError: model is not a module, or no layer has an adapter of that name.
    """
    who = "nf4kernels.set_adapter"
    layers = _layers(model, who)
    _check_name(layers, name, who)
    for layer in layers:
        layer.set_adapter(name)


def remove_adapter(model: nn.Module, name: str = "default") -> None:
    """Detach the adapters of that name from all layers of `model`, active or not.

    Where it was the active one, none is; `set_adapter` or `QuantLinear.add_lora` gives another.

    Args:
        model: any module with layers in 4 bits (experts, too), or one of them.
        name: as `QuantLinear.add_lora` or `load_adapters` was given.

    Raises:
        TypeError, ValueError: model is not a module, or no layer has an adapter of that name.
    """
    who = "nf4kernels.remove_adapter"
    layers = _layers(model, who)
    _check_name(layers, name, who)
    for layer in layers:
        if name in layer.adapter_names:
            layer.remove_adapter(name)


def _layers(model: nn.Module, who: str) -> list[AdaptedModule]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, AdaptedModule)]


def _check_name(layers: list[AdaptedModule], name: str, who: str) -> None:
    names = sorted({each for layer in layers for each in layer.adapter_names})
    if name not in names:
        raise ValueError(f"{who}: name must be one of the model's adapters {names}, got {name!r}")
