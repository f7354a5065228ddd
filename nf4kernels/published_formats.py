"""MXFP4, NVFP4 and symmetric INT4: a weight rounded by its format's own rule, in plain torch on any device.

What is published in these formats is read as it is (`storage/`); this is how `quantize` writes them, for weights that
are not. One pass of `CHUNK` weights at a time, so that memory beside the result is bounded.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .codebook import CODEBOOKS, FORMATS, SCALE_CODEBOOKS, e4m3_numbers
from .quantized_weight import QuantizedWeight, absmax_shape, packed_shape

CHUNK = 1 << 22
E2M1_MOST, E4M3_MOST = 6.0, 448.0
# Round to nearest: a tie goes to the even code, so that every other bound counts as above itself.
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def quantize_as(name: str, weight: Tensor, block_size: int) -> QuantizedWeight:
    """`weight` `[N, K]`, finite, in the format `name` of FORMATS that `WRITERS` has.

    Source: OCP Microscaling Formats 1.0, section 6.3; NVIDIA's NVFP4, as TensorRT Model Optimizer writes it; for
    integers, the symmetric rule of compressed-tensors, whose scale is the block's largest magnitude over 7.5.
    """
    N, K = weight.shape
    absmax, scale_code, values = WRITERS[name](weight, block_size)
    codes = torch.cat([*values, weight.new_zeros(0, dtype=torch.uint8)])
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), int(CODEBOOKS[name].abs().argmin()))])
    packed = (codes[0::2] << 4 | codes[1::2]).view(packed_shape(N, K))
    return QuantizedWeight(
        packed, absmax.view(absmax_shape(N, K, block_size)), None, None, CODEBOOKS[name].to(weight.device, copy=True),
        scale_code, (N, K), weight.dtype, block_size, name, FORMATS[name].scale_codebook,
    )  # fmt: skip


def _blocks(weight: Tensor, block_size: int) -> Iterator[tuple[Tensor, int]]:
    """([blocks, block_size] in fp32, how many weights of it exist), a chunk at a time."""
    flat = weight.reshape(-1)
    for begin in range(0, flat.numel(), CHUNK):
        part = flat[begin : begin + CHUNK].float()
        yield torch.nn.functional.pad(part, (0, -part.numel() % block_size)).view(-1, block_size), part.numel()


def _absmax(weight: Tensor, block_size: int) -> Tensor:
    parts = [blocks.abs().amax(1) for blocks, _ in _blocks(weight, block_size)]
    return torch.cat(parts) if parts else weight.new_zeros(0, dtype=torch.float32)


def _codes(weight: Tensor, scales: Tensor, block_size: int, encode: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The codes of weight / scale, in order; a block whose scale is 0 is one of zeros."""
    at = 0
    for blocks, count in _blocks(weight, block_size):
        own = scales[at : at + blocks.shape[0], None]
        at += blocks.shape[0]
        yield encode(torch.where(own == 0, 0, blocks / own)).view(-1)[:count]


def _e2m1_codes(values: Tensor) -> Tensor:
    size = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for i, bound in enumerate(E2M1_BOUNDS):
        codes += size >= bound if i % 2 else size > bound
    return codes | values.signbit().to(torch.uint8) << 3


def _integer_codes(values: Tensor) -> Tensor:
    return (values.round().clamp(-8, 7) + 8).to(torch.uint8)


def _mxfp4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor, Iterator[Tensor]]:
    absmax = _absmax(weight, block_size)
    exponent = absmax.frexp().exponent - 3  # floor(log2) - 2, the exponent of E2M1's largest number
    exponent = torch.where(absmax == 0, -127, exponent.clamp(-127, 127))
    scale_code = SCALE_CODEBOOKS["e8m0"].to(weight.device, copy=True)
    bytes_ = (exponent + 127).to(torch.uint8)
    return bytes_, scale_code, _codes(weight, scale_code[bytes_.long()], block_size, _e2m1_codes)


def _nvfp4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor, Iterator[Tensor]]:
    absmax = _absmax(weight, block_size)
    most = absmax.amax() if absmax.numel() else absmax.new_zeros(())
    whole = (most / torch.full_like(most, E2M1_MOST * E4M3_MOST)).clamp(min=2.0**-100)
    bytes_ = (absmax / (E2M1_MOST * whole)).clamp(max=E4M3_MOST).to(torch.float8_e4m3fn).view(torch.uint8)
    scale_code = e4m3_numbers().to(weight.device) * whole
    return bytes_, scale_code, _codes(weight, scale_code[bytes_.long()], block_size, _e2m1_codes)


def _int4_symmetric(weight: Tensor, block_size: int) -> tuple[Tensor, None, Iterator[Tensor]]:
    absmax = _absmax(weight, block_size)
    scales = (absmax / torch.full_like(absmax, 7.5)).to(weight.dtype)
    return scales, None, _codes(weight, scales.float(), block_size, _integer_codes)


WRITERS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor | None, Iterator[Tensor]]]] = {
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "int4_symmetric": _int4_symmetric,
}
