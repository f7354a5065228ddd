"""What the kernels share: a level by its code, a block's scale by the format's three operations, and the launch.

A weight decodes to code[nibble] * scale in fp32, rounded once; of int8, whose packed bytes come as int8, to the integer
itself times scale, and `code` is not read. The dtype of `packed` tells a kernel which of the two to compile. Kernels
are launched without contraction of a product and a sum to an FMA (`LAUNCH`), which would change a scale's last bit.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantized_weight import INT8_LEVELS

LAUNCH = {"enable_fp_fusion": False}


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv without the 4 us that it takes for being callable from kernels too."""
    return -(-a // b)


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one, on which Triton launches; CPU tensors run in the interpreter."""
    device = tensor.device
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def with_int8(packed: Tensor, code: Tensor) -> Tensor:
    """`packed` as kernels take it: as int8 where each byte is a weight."""
    return packed.view(torch.int8) if code.numel() == INT8_LEVELS else packed


def whole_words(packed: Tensor) -> Tensor:
    """`packed` where its words of 32 bits can be loaded, else a copy that begins at one."""
    return packed if packed.dtype == torch.int8 or packed.data_ptr() % 4 == 0 else packed.clone()


@triton.jit
def lookup(table, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """table[index] for a [ROWS, COLUMNS] index: one load from shared memory each, where a select tree takes 15."""
    flat = tl.gather(table, tl.reshape(index, [ROWS * COLUMNS]), 0)
    return tl.reshape(flat, [ROWS, COLUMNS])


@triton.jit
def block_scales(absmax, scale_absmax, scale_offset, scale_code, block, mask):
    """The fp32 scales of these blocks: absmax, or its entry of scale_code, or that of a double-quantized one.

    The table serves E8M0 and E4M3 as well: it costs linear 0.25 instructions of 9 a weight (blocks of 32, sm_90), and
    shifts would need the host to tell which of the two scale_code is.
    """
    stored = tl.load(absmax + block, mask=mask, other=0)
    if scale_code is None:
        scale = stored.to(tl.float32)
    elif scale_absmax is None:
        scale = tl.load(scale_code + stored.to(tl.int32))
    else:
        of_superblock = tl.load(scale_absmax + (block >> 8), mask=mask, other=0.0)
        scale = tl.load(scale_code + stored.to(tl.int32)) * of_superblock + tl.load(scale_offset)
    return scale


@triton.jit
def scales_of_bytes(
    absmax, scale_absmax, scale_offset, scale_code, block, mask, SCALES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The scales of COLUMNS bytes a row, as [ROWS, COLUMNS], or [ROWS, 1] where a row has one: SCALES blocks from each
    row's `block` on."""
    if SCALES == 1:
        scale = block_scales(absmax, scale_absmax, scale_offset, scale_code, block, mask)[:, None]
    else:
        blocks = block[:, None] + tl.arange(0, SCALES)[None, :]
        scale = block_scales(absmax, scale_absmax, scale_offset, scale_code, blocks, mask[:, None])
        scale = tl.broadcast_to(scale[:, :, None], [ROWS, SCALES, COLUMNS // SCALES])
        scale = tl.reshape(scale, [ROWS, COLUMNS])
    return scale


@triton.jit
def decode_int8(
    packed, absmax, scale_absmax, scale_offset, scale_code, first, block_shift, in_row, SCALES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """fp32 Ŵ, [ROWS, COLUMNS], of int8 from each row's flat index `first` on, with SCALES blocks in a row."""
    at = first[:, None] + tl.arange(0, COLUMNS)[None, :]
    integers = tl.load(packed + at, mask=in_row[:, None], other=0)
    scale = scales_of_bytes(
        absmax, scale_absmax, scale_offset, scale_code, first >> block_shift, in_row, SCALES, ROWS, COLUMNS
    )
    return integers.to(tl.float32) * scale


@triton.jit
def decode_elements(
    packed, absmax, scale_absmax, scale_offset, code, scale_code, block_shift, index, mask,
    dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Ŵ at these flat indices [ROWS, COLUMNS], wherever blocks and bytes begin; 0 where the mask is off."""
    byte = tl.load(packed + (index if packed.dtype.element_ty == tl.int8 else index >> 1), mask=mask, other=0)
    if packed.dtype.element_ty != tl.int8:
        nibble = tl.where(index % 2 == 0, byte.to(tl.int32) >> 4, byte.to(tl.int32) & 15)
    scale = block_scales(absmax, scale_absmax, scale_offset, scale_code, index >> block_shift, mask)
    if packed.dtype.element_ty == tl.int8:
        value = byte.to(tl.float32) * scale
    else:
        value = lookup(tl.load(code + tl.arange(0, 16)), nibble, ROWS, COLUMNS) * scale
    return tl.where(mask, value, 0.0).to(dtype)
