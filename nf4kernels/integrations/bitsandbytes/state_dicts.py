"""Linear4bit's own state dict, loaded: bitsandbytes saves it and has nothing that reads it back."""

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import modules

from ...quantized_weight import SUPERBLOCK, QuantizedWeight
from ...storage.bitsandbytes_format import stored_weights, weight_from_tensors
from .quant_state import WHO

_load = modules.Linear4bit._load_from_state_dict


def quant_state_of(qweight: QuantizedWeight) -> functional.QuantState:
    """As bitsandbytes has it; shares memory."""
    nested = None
    if qweight.double_quant:
        nested = functional.QuantState(
            absmax=qweight.scale_absmax, code=qweight.scale_code, blocksize=SUPERBLOCK, dtype=torch.float32
        )
    return functional.QuantState(
        absmax=qweight.absmax.reshape(-1), shape=torch.Size(qweight.shape), code=qweight.code,
        blocksize=qweight.block_size, quant_type=qweight.codebook, dtype=qweight.dtype, offset=qweight.scale_offset,
        state2=nested,
    )  # fmt: skip


def load_from_state_dict(
    self: Any, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
) -> None:
    """As nn.Linear's; a weight that is quantized in the state is taken over with all that belongs to it.

    What does not fit is an error of `load_state_dict`, and nothing of the layer is loaded.
    """
    key = f"{prefix}weight"
    names = stored_weights(name for name in state_dict if name.startswith(key)).get(key)
    if names is None:
        _load(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        return
    assign = local_metadata.get("assign_to_params_buffers", False) or self.weight.is_meta
    own = {name: state_dict[name] for name in names}
    if not self.weight.is_meta:
        own = {name: tensor.to(self.weight.device, copy=not assign) for name, tensor in own.items()}
    try:
        qweight = weight_from_tensors(own, key)
    except (TypeError, ValueError) as error:
        error_msgs.append(str(error))
        return
    if qweight.shape != (self.out_features, self.in_features):
        wanted = [self.out_features, self.in_features]
        error_msgs.append(f"{WHO}: {key} must have shape {wanted}, got {list(qweight.shape)}")
        return
    rest = {name: value for name, value in state_dict.items() if name.startswith(prefix) and name not in own}
    missing_weight: list[str] = []
    wrong = len(error_msgs)
    _load(self, rest, prefix, local_metadata, strict, missing_weight, unexpected_keys, error_msgs)
    missing_keys += [name for name in missing_weight if name != key]
    if len(error_msgs) == wrong:
        install(self, qweight)


def install(module: Any, qweight: QuantizedWeight) -> None:
    """Make `qweight` the layer's, in the storage dtype that the layer has; shares memory."""
    old, state = module.weight, quant_state_of(qweight)
    packed = as_stored(qweight.packed, old.quant_storage)
    if old.is_meta or not isinstance(old, modules.Params4bit):
        module.weight = modules.Params4bit(packed, quant_storage=old.quant_storage)
    else:
        old.data = packed
    weight = module.weight
    weight.requires_grad_(False)
    weight.quant_state = module.quant_state = state
    weight.blocksize, weight.quant_type, weight.compress_statistics = state.blocksize, state.quant_type, state.nested
    weight.bnb_quantized, weight.module = True, module


def as_stored(packed: torch.Tensor, quant_storage: torch.dtype) -> torch.Tensor:
    """`[n, 1]` in the storage dtype; ValueError where the bytes are no whole number of its elements."""
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"{WHO}: quant_storage must divide the packed bytes, got {quant_storage} for {packed.numel()} bytes"
        )
    return packed.reshape(-1).view(quant_storage).view(-1, 1)
