"""A rank that gets its weights from rank 0, by accelerate's `cpu_ram_efficient_loading`: room for them, and no values.

`torch.empty` on the CPU takes addresses and no memory until something writes. On the meta device what follows would
break: PEFT puts adapters where their layer is, and accelerate tells an optimizer's parameters apart by their addresses.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import is_fsdp_enabled, is_local_dist_rank_0

from ...quantized_weight import QuantizedExperts, QuantizedWeight
from .config import Nf4Config
from .targets import Target, quantized

AnyWeight = QuantizedWeight | QuantizedExperts
BYTES = ("packed", "absmax")


def awaits_weights() -> bool:
    """As transformers itself asks: FSDP with cpu_ram_efficient_loading, and not the first rank of a machine."""
    return is_fsdp_enabled() and not is_local_dist_rank_0()


def room_for(target: Target, dtype: torch.dtype, config: Nf4Config) -> AnyWeight:
    """What a dense tensor of the target would become, of any values."""
    return without_values(quantized(target, torch.empty(target.shape, dtype=dtype, device="meta"), config))


def without_values(qweight: AnyWeight) -> AnyWeight:
    """The same with bytes, and what is on meta, of any values on the CPU."""
    tensors = {field.name: getattr(qweight, field.name) for field in fields(qweight)}
    empty: dict[str, Any] = {
        name: torch.empty_like(value, device="cpu")
        for name, value in tensors.items()
        if isinstance(value, Tensor) and (name in BYTES or value.is_meta)
    }
    return replace(qweight, **empty)


def room_for_dense(model: nn.Module, name: str) -> Tensor:
    """As the model on meta has it."""
    owner, _, leaf = name.rpartition(".")
    return torch.empty_like(getattr(model.get_submodule(owner), leaf), device="cpu", requires_grad=False)
