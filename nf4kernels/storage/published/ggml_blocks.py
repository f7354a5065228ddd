"""ggml's blocks, row by row in bytes: Q4_0 and IQ4_NL as they are, and the types of dense tensors as numbers.

A block of 32 weights is an fp16 scale and 16 bytes of codes, element j low and element j + 16 high in byte j. Q6_K and
Q8_0, in which such files keep embeddings and the head, are 6 and 8 bits: their numbers are exact in fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...codebook import CODEBOOKS
from ...quantized_weight import QuantizedWeight
from .nibbles import check_finite, halves_interleaved

BLOCK = 32
BYTES = 18
# ggml's number of a type -> its name; those below are read.
NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
IN_4_BITS = {"Q4_0": "q4_0", "IQ4_NL": "iq4_nl"}  # ggml's name -> the codebook's
ASYMMETRIC = ("Q4_1", "Q4_K", "Q5_1", "Q5_K", "Q2_K")
NUMBERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# name -> (weights, bytes) of a block
SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210)} | dict.fromkeys(
    IN_4_BITS, (BLOCK, BYTES)
)


def weight_from_rows(rows: Tensor, codebook: str, dtype: torch.dtype) -> QuantizedWeight:
    """`[N, K]` of uint8 `[N, K/32 * 18]`; ValueError for a cut block and for a scale that is NaN or inf."""
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] % BYTES:
        raise ValueError(f"the blocks must be uint8 [N, K/32 * 18], got {rows.dtype} {list(rows.shape)}")
    N, blocks = rows.shape[0], rows.shape[1] // BYTES
    rows = rows.view(N, blocks, BYTES)
    absmax = rows[..., :2].contiguous().view(torch.float16).view(N, blocks)
    check_finite(absmax, "the scales of the blocks")
    packed = halves_interleaved(rows[..., 2:]).reshape(N, blocks * BLOCK // 2)
    code = CODEBOOKS[codebook].to(rows.device, copy=True)
    shape = (N, blocks * BLOCK)
    return QuantizedWeight(packed, absmax, None, None, code, None, shape, dtype, BLOCK, codebook, None)


def numbers_from_rows(rows: Tensor, kind: str) -> Tensor:
    """The numbers `[..., K]` of uint8 `[..., bytes]`: in fp32, or in the dtype of plain ones."""
    if kind in NUMBERS:
        return rows.contiguous().view(NUMBERS[kind])
    size, width = SIZES[kind]
    blocks = rows.reshape(-1, width)
    return DECODERS[kind](blocks).reshape(*rows.shape[:-1], rows.shape[-1] // width * size)


def _q4(codebook: str) -> Callable[[Tensor], Tensor]:
    def decode(blocks: Tensor) -> Tensor:
        codes = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1)
        return CODEBOOKS[codebook][codes.long()] * _half(blocks[:, :2])

    return decode


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks[:, :2])


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 of two high bits, 16 int8 scales and an fp16 one, of 256 weights."""
    low = blocks[:, :128].view(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], 2).view(-1, 8, 32)
    high = blocks[:, 128:192].view(-1, 2, 1, 32)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 8, 32)
    codes = (low | high << 4).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks[:, 208:])
    return codes.view(-1, 16, 16).float() * scales[..., None]


def _half(pair: Tensor) -> Tensor:
    """fp32 `[blocks, 1]` of the two bytes of an fp16 number."""
    return pair.contiguous().view(torch.float16).float()


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q6_K": _q6_k, "Q4_0": _q4("q4_0"), "IQ4_NL": _q4("iq4_nl"),
}  # fmt: skip
