"""bitsandbytes' layers, quant states and state dicts as ours and back, bit for bit, by way of the format on disk."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import modules
from torch import Tensor, nn

from ...codebook import CODEBOOKS, SCALE_CODEBOOKS, name_of
from ...model.plan import move_hooks, replace_module
from ...model.walk import named_modules
from ...nn.quant_linear import COLUMN_ORDER, OF_WEIGHT, QuantLinear
from ...nn.quant_module import QuantModule
from ...quantized_weight import BLOCK_SIZES, WEIGHT_DTYPES, QuantizedWeight
from ...storage.bitsandbytes_format import stored_weights, weight_from_tensors, weight_to_tensors
from .quant_state import WHO, is_repacked, restored
from .state_dicts import as_stored, install, quant_state_of


def from_bnb(obj: Any) -> Any:
    """What bitsandbytes made, as ours: the same bits.

    Args:
        obj: a Linear4bit or a Params4bit that was quantized; (packed, QuantState); a state dict; or a model, whose
            Linear4bit are exchanged in place.

    Returns:
        A QuantLinear, a QuantizedWeight, a state dict for QuantLinear layers, or the model. They share memory with obj.

    Raises:
        TypeError: obj is nothing of these.
        ValueError: a weight is not 2-D, not quantized or not there (on meta), a layer is under PEFT's adapters or
            accelerate's hooks, or the model has no Linear4bit. Nothing is exchanged.
        RuntimeError: a weight that bitsandbytes repacked for the CPU has lost bits of its scales.
    """
    who = f"{WHO}.from_bnb"
    if isinstance(obj, nn.Module):
        return _exchanged(obj, modules.Linear4bit, lambda name, layer: _quant_linear(layer, f"{who}: {name}"), who)
    if isinstance(obj, modules.Params4bit):
        return _qweight(obj.data, obj.quant_state, who)
    if isinstance(obj, tuple) and len(obj) == 2 and isinstance(obj[1], functional.QuantState):
        return _qweight(*obj, who)
    if isinstance(obj, Mapping):
        return _state_from_bnb(obj, who)
    raise TypeError(
        f"{who}: obj must be a module, a Params4bit, (packed, QuantState) or a state dict, got {type(obj).__name__}"
    )


def to_bnb(obj: Any, quant_storage: torch.dtype = torch.uint8) -> Any:
    """What we made, as bitsandbytes': the same bits.

    Args:
        obj: a QuantLinear; a QuantizedWeight; a state dict of QuantLinear layers; or a model, whose QuantLinear are
            exchanged in place.
        quant_storage: the dtype in which bitsandbytes holds the packed bytes.

    Returns:
        A Linear4bit, (packed, QuantState), a state dict for Linear4bit layers, or the model. They share memory with
        obj.

    Raises:
        TypeError: obj is nothing of these.
        ValueError: a codebook is neither nf4 nor fp4, a layer has adapters or is on meta, the model has QuantExperts or
            no QuantLinear, or a state dict does not say how large a weight is. Nothing is exchanged.
    """
    who = f"{WHO}.to_bnb"
    if isinstance(obj, nn.Module):
        return _exchanged(
            obj, QuantModule, lambda name, layer: _linear4bit(layer, quant_storage, f"{who}: {name}"), who
        )
    if isinstance(obj, QuantizedWeight):
        weight_to_tensors(obj, bitsandbytes=True)  # refuses a codebook that bitsandbytes does not know
        return as_stored(obj.packed, quant_storage), quant_state_of(obj)
    if isinstance(obj, Mapping):
        return _state_to_bnb(obj, quant_storage, who)
    raise TypeError(f"{who}: obj must be a module, a QuantizedWeight or a state dict, got {type(obj).__name__}")


def _exchanged(model: nn.Module, kind: type[nn.Module], convert: Callable[[str, Any], nn.Module], who: str) -> Any:
    """The model, or in its place the layer that it is, with what `convert` makes of each layer of a kind."""
    layers = {name: module for name, module in named_modules(model) if isinstance(module, kind)}
    if not layers:
        raise ValueError(f"{who}: obj must hold a {kind.__name__}, got a {type(model).__name__} without one")
    for name, layer in layers.items():
        if name.endswith("base_layer"):
            raise ValueError(f"{who}: {name} must not be under PEFT's adapters yet: convert, then call get_peft_model")
        if hasattr(layer, "_hf_hook"):
            raise ValueError(
                f"{who}: {name} must not be under accelerate's hooks: remove_hook_from_submodules(model) first"
            )
    new: dict[int, nn.Module] = {}  # by the old one, which may stand in several places
    for name, layer in layers.items():
        if id(layer) not in new:
            new[id(layer)] = convert(name or type(layer).__name__, layer).train(layer.training)
    if "" in layers:
        move_hooks(layers[""], new[id(layers[""])])
        return new[id(layers[""])]
    for name, layer in layers.items():
        replace_module(model, [name], layer, new[id(layer)])
    return model


def _quant_linear(layer: Any, who: str) -> QuantLinear:
    state = layer.weight.quant_state if isinstance(layer.weight, modules.Params4bit) else layer.quant_state
    qweight = _qweight(layer.weight.data, state or layer.quant_state, who)
    return QuantLinear.from_quantized(qweight, layer.bias, layer.compute_dtype)


def _qweight(packed: Tensor, state: functional.QuantState | None, who: str) -> QuantizedWeight:
    if state is None or packed.is_meta:
        raise ValueError(f"{who}: the weight must be quantized and on a device (layer.to(device) quantizes it)")
    if is_repacked(state):
        packed, state = restored(packed, state)
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return weight_from_tensors({"weight": packed, **tensors})


def _linear4bit(layer: Any, quant_storage: torch.dtype, who: str) -> modules.Linear4bit:
    if not isinstance(layer, QuantLinear):
        raise ValueError(f"{who} must be a QuantLinear: bitsandbytes has no {type(layer).__name__}")
    if layer.adapter_names:
        raise ValueError(
            f"{who} must have no adapters, got {layer.adapter_names}: merge or remove them (nf4kernels.remove_adapter)"
        )
    qweight = layer.qweight
    weight_to_tensors(qweight, bitsandbytes=True)
    new = modules.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=layer.compute_dtype,
        quant_storage=quant_storage, device="meta",
    )  # fmt: skip
    install(new, qweight)
    new.bias = layer.bias
    return new


def _state_from_bnb(state_dict: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    state = dict(state_dict)
    for key, names in stored_weights(state_dict).items():
        prefix, _, leaf = key.rpartition("weight")
        if leaf or (prefix and not prefix.endswith(".")):
            raise ValueError(f"{who}: {key} must be the weight of a linear layer")
        tensors = {name: state.pop(name) for name in names}
        layer = QuantLinear.from_quantized(weight_from_tensors(tensors, key))
        state |= {prefix + name: tensor for name, tensor in layer.state_dict().items()}
    return state


def _state_to_bnb(state_dict: Mapping[str, Tensor], quant_storage: torch.dtype, who: str) -> dict[str, Tensor]:
    state = dict(state_dict)
    for key in state_dict:
        prefix, _, leaf = key.rpartition("source_dtype")
        if leaf or f"{prefix}code" not in state_dict or f"{prefix}absmax" not in state_dict:
            continue
        own = {name: state.pop(f"{prefix}{name}", None) for name in OF_WEIGHT}
        tensors = weight_to_tensors(_qweight_of_state(own, f"{prefix}weight", who), f"{prefix}weight", True)
        tensors[f"{prefix}weight"] = as_stored(tensors[f"{prefix}weight"], quant_storage)
        state |= tensors
    return state


def _qweight_of_state(own: Mapping[str, Any], key: str, who: str) -> QuantizedWeight:
    """The weight of a QuantLinear's state, whose shapes say what its attributes do."""
    packed, absmax = own["weight"], own["absmax"]
    if packed is None or packed.dim() != 2:
        raise ValueError(f"{who}: {key} must be [N, K/2], got {None if packed is None else list(packed.shape)}")
    if own["code"].numel() != 16:
        raise ValueError(f"{who}: {key} must be in 4 bits, got int8")
    N, K = packed.shape[0], 2 * packed.shape[1]
    sizes = [size for size in BLOCK_SIZES if -(-N * K // size) == absmax.numel()]
    if len(sizes) != 1:
        raise ValueError(
            f"{who}: {key} must tell its block size by its scales, got {absmax.numel()}: convert the layer"
        )
    return QuantizedWeight(
        packed, absmax, own["scale_absmax"], own["scale_offset"], own["code"], own["scale_code"], (N, K),
        WEIGHT_DTYPES[int(own["source_dtype"])], sizes[0], name_of(own["code"], CODEBOOKS),
        own["scale_code"] if own["scale_code"] is None else name_of(own["scale_code"], SCALE_CODEBOOKS),
        own[COLUMN_ORDER],
    )  # fmt: skip
