"""A model made ready for training its adapters."""

import warnings

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..nn.adapted_module import AdaptedModule
from ..nn.quant_module import QuantModule
from .training import training_dtype

HALVES = (torch.bfloat16, torch.float16)


def prepare_for_training(model: nn.Module, checkpointing: bool = True) -> nn.Module:
    """Freeze all of `model` but its active adapters, in place, and make it train fast on the machine it is on.

    It takes the place of PEFT's `prepare_model_for_kbit_training`: a 4-bit model without adapters is frozen as a whole,
    for `get_peft_model` to add them; in one that has PEFT's adapters, what PEFT made trainable stays so.

    Where 16-bit arithmetic is slow (see `training_dtype`) its 16-bit tensors become float32, which a warning says;
    weights in 4 bits stay as they are. Elsewhere every tensor keeps its dtype. What is to be trained beside the
    adapters is unfrozen after this call, and `save_adapters` saves it with them.

    Args:
        model: with layers in 4 bits, or with adapters.
        checkpointing: recompute activations in backward where the model offers that by
            `gradient_checkpointing_enable`, as transformers' do: less memory, about a third more time.

    Returns:
        model.

    Raises:
        TypeError, ValueError: model is not a module, or has neither a layer in 4 bits nor an adapter.
    """
    who = "nf4kernels.prepare_for_training"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    has_peft = any(isinstance(vars(module).get("peft_config"), dict) for module in model.modules())
    if not layers and not has_peft:
        raise ValueError(
            f"{who}: model must have a layer in 4 bits or an adapter to train, got none (quantize_model gives both)"
        )
    if not has_peft:  # which has frozen what it does not train
        for parameter in model.parameters():
            if not is_lazy(parameter):  # torch cannot freeze what is not there yet
                parameter.requires_grad_(False)
    for layer in layers:
        if isinstance(layer, AdaptedModule) and layer.lora is not None:
            layer.set_adapter(layer.adapter_name)
    device = layers[0].weight.device if layers else next(model.parameters()).device
    _cast_where_slow(model, device, who)
    if checkpointing and getattr(model, "supports_gradient_checkpointing", True):
        for kind in ("activation", "gradient"):  # transformers calls it gradient_checkpointing_enable before 5.24
            enable = getattr(model, f"{kind}_checkpointing_enable", None)
            if enable is not None:
                enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
                break
        if enable is not None:
            # A reentrant checkpoint, which a trainer may ask for, has no gradient where no input requires one.
            require_input_gradients = getattr(model, "enable_input_require_grads", None)
            if require_input_gradients is not None:
                require_input_gradients()
    return model


def _cast_where_slow(model: nn.Module, device: torch.device, who: str) -> None:
    """16-bit tensors to fp32 where that is the faster dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    came = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.dtype in HALVES})
    if not came or training_dtype(device) != torch.float32:
        return
    model._apply(lambda tensor: tensor.float() if tensor.dtype in HALVES else tensor)
    warnings.warn(f"{who}: dense parts are in float32 now, {' and '.join(came)} trains slowly on this {device.type}",
                  stacklevel=3)  # fmt: skip
