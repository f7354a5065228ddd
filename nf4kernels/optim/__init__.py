"""Optimizers and activations whose memory leaves the device when it is short."""

from .offload import offload_activations
from .paged_adamw import PagedAdamW

__all__ = ["PagedAdamW", "offload_activations"]
