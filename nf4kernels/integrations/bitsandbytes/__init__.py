"""bitsandbytes on our kernels, and its layers, quant states and checkpoints as ours, bit for bit, both ways."""

from . import versions  # noqa: F401 (first: it says what to install)
from .convert import from_bnb, to_bnb
from .patching import is_patched, patch, unpatch

__all__ = ["from_bnb", "is_patched", "patch", "to_bnb", "unpatch"]
