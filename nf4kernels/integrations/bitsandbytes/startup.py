"""Patches bitsandbytes as soon as a program imports it, for programs that one only starts.

`nf4kernels_patch_bitsandbytes.pth` runs this file at the start of each interpreter in whose environment
NF4KERNELS_PATCH_BITSANDBYTES is set, by its path: nothing of the package, and so no torch, is imported before
bitsandbytes is.
"""

import os
import sys

VARIABLE = "NF4KERNELS_PATCH_BITSANDBYTES"


class PatchingFinder:
    """Finds bitsandbytes as the finders after it do, and has its loader call `patch` when it is done."""

    def find_spec(self, name, path=None, target=None):
        if name != "bitsandbytes":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _patched_after(spec.loader)  # type: ignore[method-assign]
        return spec


def _patched_after(loader):
    def exec_module(module):
        del loader.exec_module  # its class's own
        loader.exec_module(module)
        if os.environ.get(VARIABLE) not in (None, "", "0", "1"):
            raise ValueError(f"nf4kernels: {VARIABLE} must be 1, 0 or unset, got {os.environ[VARIABLE]}")
        from nf4kernels.integrations.bitsandbytes.patching import patch  # not the package, which may be importing this

        patch()

    return exec_module


# In a virtual environment Python runs a .pth file twice.
if not any(type(finder).__name__ == PatchingFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, PatchingFinder())
