"""bitsandbytes' QuantState as arguments of our ops, and what it makes of a weight that it repacked for the CPU."""

import copy
import math

import torch
from bitsandbytes import functional
from torch import Tensor

from ...codebook import CODEBOOKS
from ...quantized_weight import SUPERBLOCK, WeightArgs

WHO = "nf4kernels.integrations.bitsandbytes"
QUANT_TYPES = ("nf4", "fp4")
_unpack = functional._convert_weight_packed_for_cpu_inverse  # bitsandbytes' own, also while ours stands there
_CODES: dict[tuple[str, torch.device], Tensor] = {}


def code_of(quant_type: str, device: torch.device) -> Tensor:
    """fp32 `[16]` on the device; it is by the name that bitsandbytes decodes, never by `QuantState.code`."""
    code = _CODES.get((quant_type, device))
    if code is None:
        if quant_type not in QUANT_TYPES:
            raise ValueError(f"{WHO}: quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
        code = _CODES[quant_type, device] = CODEBOOKS[quant_type].to(device)
    return code


def matrix_shape(shape) -> tuple[int, int]:
    """(N, K) of a tensor of any shape: its last dimension is K."""
    return math.prod(shape[:-1]), (shape[-1] if len(shape) else 1)


def as_bytes(packed: Tensor) -> Tensor:
    """The packed codes, contiguous, in whichever dtype they are stored."""
    packed = packed.contiguous()
    return packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)


def weight_args(packed: Tensor, state: functional.QuantState, N: int, K: int) -> WeightArgs:
    """A weight of bitsandbytes as our ops take it: `packed` in its storage dtype and any orientation of `[n, 1]`."""
    absmax, second = state.absmax, state.state2
    code = code_of(state.quant_type, packed.device)
    scale_absmax = scale_offset = scale_code = None
    if second is not None and second.blocksize == SUPERBLOCK:
        scale_absmax, scale_offset, scale_code = second.absmax, state.offset, second.code
        if scale_offset.dtype != torch.float32:  # some checkpoints' loaders cast it
            scale_offset = scale_offset.float()
    elif second is not None:
        absmax = functional.dequantize_blockwise(absmax, second) + state.offset
    return as_bytes(packed), absmax, scale_absmax, scale_offset, code, scale_code, N, K, state.blocksize


def is_repacked(state: functional.QuantState) -> bool:
    """Whether bitsandbytes has the weight in its layout for AVX512-BF16, which also rounds the scales to bf16."""
    return state.absmax.dtype == torch.bfloat16


def restored(packed: Tensor, state: functional.QuantState) -> tuple[Tensor, functional.QuantState]:
    """What `is_repacked`, as it was before; both are new, the arguments stay as they are.

    Raises:
        RuntimeError: the scales were not bf16 before, so that repacking lost their bits.
    """
    if state.original_nested or state.original_dtype != torch.bfloat16:
        kind = "nested" if state.original_nested else str(state.original_dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{WHO}: the weight must be as bitsandbytes quantized it, got one that an eval forward repacked for this"
            f" CPU before patch(), which rounded its {kind} scales to bfloat16 for good: call patch() before the first"
            " forward, or load the weight again"
        )
    packed, state = _unpack(packed, copy.copy(state))
    state.absmax = state.absmax.T.reshape(-1).float()
    return packed, state
