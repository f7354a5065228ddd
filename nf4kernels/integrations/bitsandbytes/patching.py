"""patch and unpatch: what of bitsandbytes is exchanged, and how it comes back."""

import warnings
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional
from bitsandbytes.autograd import _functions
from bitsandbytes.nn import modules

from . import replacements
from .kernels import KERNELS

_MISSING: Any = object()


class _Patch:
    """The exchanged attributes and the registered kernels."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []  # (owner, attribute, what stood in the owner itself)
        self._library = torch.library.Library("bitsandbytes", "IMPL")

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def implement(self, key: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for op, kernel in KERNELS.items():
                if hasattr(torch.ops.bitsandbytes, op.partition(".")[0]):
                    self._library.impl(op, kernel, key)

    def undo(self) -> None:
        for owner, name, value in reversed(self._before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._library._destroy()


_active: _Patch | None = None


def patch() -> None:
    """Let bitsandbytes' 4-bit quantize, dequantize and products run on our kernels, on the CPU and on CUDA."""
    global _active
    if _active is not None:
        return
    _active = new = _Patch()
    new.implement("CPU")
    new.replace(functional, "quantize_4bit", replacements.quantize_4bit)
    new.replace(functional, "dequantize_4bit", replacements.dequantize_4bit)
    for owner in (bitsandbytes, _functions):
        new.replace(owner, "matmul_4bit", replacements.matmul_4bit)
    new.replace(_functions.MatMul4Bit, "backward", staticmethod(replacements.matmul_backward))
    new.replace(modules.Linear4bit, "forward", replacements.linear4bit_forward)


def unpatch() -> None:
    """Put back every attribute and kernel that `patch` exchanged; nothing where it is not patched."""
    global _active
    if _active is not None:
        _active.undo()
        _active = None


def is_patched() -> bool:
    return _active is not None
