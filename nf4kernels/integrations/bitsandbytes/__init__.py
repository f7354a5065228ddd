"""bitsandbytes on our kernels."""

from .patching import is_patched, patch, unpatch

__all__ = ["is_patched", "patch", "unpatch"]
