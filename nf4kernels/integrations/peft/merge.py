"""What PEFT's merge makes of a layer in 4 bits: a dense one of Ŵ, one of the original weights, or 4 bits again."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn

from ...model.merge import base_weights_of
from ...model.plan import unwrapped
from ...quantized_weight import WEIGHT_DTYPES


class Packed(NamedTuple):
    """A layer of PEFT's over one in 4 bits."""

    name: str  # in the dense model
    layer: nn.Module
    packed: Any


T = TypeVar("T", bound=nn.Module)
WORDS = ("dequantized", "4bit")
_target: ContextVar[str | nn.Module] = ContextVar("nf4kernels_merge_target", default="dequantized")
_dtype: ContextVar[torch.dtype | None] = ContextVar("nf4kernels_merge_dtype", default=None)
_base_weights: ContextVar[dict[nn.Module, list[Tensor]]] = ContextVar("nf4kernels_merge_base", default={})  # noqa: B039


@contextmanager
def merge_into(target: str | nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside `with merge_into(...)`, what `merge_and_unload()` and `merge_adapter()` make of layers in 4 bits.

    Args:
        target: "dequantized", what they do without this as well: a dense layer of Ŵ plus the adapter's product. Or the
            model before quantization, whose weights W then take the place of Ŵ, which also undoes the quantization
            error; its layers are found by name, and it is read only. Or "4bit": the sum is rounded to 4 bits again, in
            the layer's own codebook and block size, which takes most of the fine-tuning away; a warning says so.
        dtype: of the dense layers; float32, bfloat16, float16, or None for what each layer was (its `dense_dtype`).

    Raises:
        TypeError, ValueError: an argument is wrong; when merging, where the model lacks a layer or has it in another
            shape: no layer is merged then.
    """
    who = "nf4kernels.integrations.peft.merge_into"
    if isinstance(target, str):
        if target not in WORDS:
            raise ValueError(f"{who}: target must be 'dequantized', '4bit' or the dense base model, got {target!r}")
    elif not isinstance(target, nn.Module):
        came = type(target).__name__
        raise TypeError(f"{who}: target must be 'dequantized', '4bit' or the dense base model, got {came}")
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: dtype must be float32, bfloat16, float16 or None, got {dtype}")
    if target == "4bit":
        if dtype is not None:
            raise ValueError(f"{who}: dtype must be None with '4bit', got {dtype}")
        warnings.warn(
            f"{who}: rounding the merged weights to 4 bits again takes most of the fine-tuning away; merge into"
            " 'dequantized' or into the base model to keep it",
            stacklevel=3,
        )
    tokens = _target.set(target), _dtype.set(dtype)
    try:
        yield
    finally:
        _target.reset(tokens[0])
        _dtype.reset(tokens[1])


def check_not_offloaded(packed: nn.Module) -> None:
    """ValueError where accelerate keeps the layer's weights elsewhere: it would put the packed ones back."""
    hook = getattr(packed, "_hf_hook", None)
    if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
        raise ValueError(
            "nf4kernels.integrations.peft: a layer must be on its device to be merged, got one that accelerate has"
            " offloaded; load the model without offloading"
        )


def with_hook_of(packed: nn.Module, merged: T) -> T:
    """`merged` with accelerate's hook of `packed`, which moves inputs to the layer's device."""
    hook: Any = getattr(packed, "_hf_hook", None)
    if hook is not None:
        add_hook_to_module(merged, hook)
    return merged


def into_4_bits() -> bool:
    return _target.get() == "4bit"


def merge_dtype() -> torch.dtype | None:
    return _dtype.get()


def base_weights(layer: nn.Module) -> list[Tensor] | None:
    """The weights that take the place of Ŵ in the layer's merge; None for Ŵ itself."""
    if isinstance(_target.get(), str):
        return None
    found = _base_weights.get().get(layer)
    if found is None:
        raise ValueError(
            "nf4kernels.integrations.peft.merge_into: with a base model the whole model must be merged, by"
            " merge_and_unload() or merge_adapter(), got one layer's merge()"
        )
    return found


@contextmanager
def finding_base_weights(layers: Iterable[Packed]) -> Iterator[None]:
    """Look up what `merge_into` was given a model for, before the first layer is merged."""
    target = _target.get()
    if isinstance(target, str):
        yield
        return
    who = "nf4kernels.integrations.peft.merge_into"
    base = unwrapped(target, "target", who)
    token = _base_weights.set({each.layer: base_weights_of(base, each.name, each.packed, who) for each in layers})
    try:
        yield
    finally:
        _base_weights.reset(token)
