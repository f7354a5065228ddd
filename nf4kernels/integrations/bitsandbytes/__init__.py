"""bitsandbytes on our kernels, and its layers, quant states and checkpoints as ours, bit for bit, both ways."""

from ..requirement import require

require("bitsandbytes")  # before the next lines import what an older one lacks

from .convert import from_bnb, to_bnb
from .patching import is_patched, patch, unpatch

__all__ = ["from_bnb", "is_patched", "patch", "to_bnb", "unpatch"]
