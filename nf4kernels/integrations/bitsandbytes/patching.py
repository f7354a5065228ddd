"""patch and unpatch: what of bitsandbytes is exchanged, and how it comes back."""

import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional
from bitsandbytes.autograd import _functions
from bitsandbytes.nn import modules

from ...backends.select import decide
from . import replacements, state_dicts
from .kernels import KERNELS, ScalesKernel

_MISSING: Any = object()
_REPACK, _UNPACK = "_convert_weight_packed_for_cpu", "_convert_weight_packed_for_cpu_inverse"
# (owner, attribute, what stands there while it is patched)
REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (functional, "quantize_4bit", replacements.quantize_4bit),
    (functional, "dequantize_4bit", replacements.dequantize_4bit),
    *((owner, "matmul_4bit", replacements.matmul_4bit) for owner in (bitsandbytes, _functions)),
    (_functions.MatMul4Bit, "backward", staticmethod(replacements.matmul_backward)),
    (modules.Linear4bit, "forward", replacements.linear4bit_forward),
    (modules.Linear4bit, "_load_from_state_dict", state_dicts.load_from_state_dict),
    *((owner, _REPACK, replacements.leave_packed) for owner in (functional, modules)),
    *((owner, _UNPACK, replacements.unpacked) for owner in (functional, modules)),
)


class _Patch:
    """The exchanged attributes and the registered kernels."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []  # what stood in the owner itself
        self._library = torch.library.Library("bitsandbytes", "IMPL")
        self.is_active = True

    def apply(self) -> None:
        for op, kernel in KERNELS.items():
            self._implement(op, kernel, "CPU")
        scales = ScalesKernel("CPU")
        self._implement("quantize_blockwise", scales, "CPU", with_keyset=True)
        for owner, name, value in REPLACED:
            self._before.append((owner, name, vars(owner).get(name, _MISSING)))
            setattr(owner, name, value)
        torch.cuda._lazy_call(self._add_cuda)  # when it is initialised, now or later: this must not do it

    def _add_cuda(self) -> None:
        """Bitsandbytes' own kernels stay on GPUs where only plain PyTorch would stand in their place."""
        if self.is_active and decide("cuda").backend in ("native", "triton"):
            for op, kernel in KERNELS.items():
                self._implement(op, kernel, "CUDA")
            replacements.DEVICES.add("cuda")

    def _implement(self, op: str, kernel: Callable, key: str, **options) -> None:
        if hasattr(torch.ops.bitsandbytes, op.partition(".")[0]):  # gemm_4bit came with 0.50
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Warning only once for all operators")
                self._library.impl(op, kernel, key, **options)

    def undo(self) -> None:
        self.is_active = False
        for owner, name, value in reversed(self._before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._library._destroy()
        replacements.DEVICES.discard("cuda")


_active: _Patch | None = None


def patch() -> None:
    """Let bitsandbytes' 4-bit quantize, dequantize and products run on our kernels, on the CPU and on CUDA.

    For all that uses bitsandbytes in this process, from now on: its functions, its modules, `torch.ops.bitsandbytes`.
    Weights are quantized to the bytes that `nf4kernels.quantize` makes (nested scales with the codebook dynamic8) and
    are never repacked; a weight that was, before, is put back where its scales survived it, else using it is a
    RuntimeError. `Linear4bit` leaves the dtype of its bias alone and loads its own state dict. Calling it again does
    nothing.
    """
    global _active
    if _active is None:
        made = _Patch()
        made.apply()
        _active = made


def unpatch() -> None:
    """Put back every attribute and kernel that `patch` exchanged; nothing where it is not patched."""
    global _active
    if _active is not None:
        _active.undo()
        _active = None


def is_patched() -> bool:
    return _active is not None
