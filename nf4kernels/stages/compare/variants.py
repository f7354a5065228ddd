"""The ways to store a weight that are compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...codebook import DOUBLE_QUANT_CODEBOOKS, FORMATS
from ...quantized_weight import BLOCK_SIZES
from ..errors import StageError

CODEBOOKS = ("nf4", "fp4", "int4", "af4", "mxfp4", "nvfp4", "int8")
SCALES = (*DOUBLE_QUANT_CODEBOOKS, "float32")  # double quantization by that codebook, or none


@dataclass(frozen=True)
class Variant:
    """One way to store the weights; `scales` is one of SCALES, or the own kind of a format that fixes it."""

    codebook: str
    block_size: int
    scales: str

    def quantize_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"codebook": self.codebook, "block_size": self.block_size}
        if self.codebook not in FORMATS:
            double = self.scales in DOUBLE_QUANT_CODEBOOKS
            options |= {"double_quant": double} | ({"scale_codebook": self.scales} if double else {})
        return options


def variants(codebooks: Iterable[str], block_sizes: Iterable[int], scales: Iterable[str]) -> list[Variant]:
    """Every combination; a codebook whose format fixes block size and scales comes once.

    Raises:
        StageError: a name or a size is none of CODEBOOKS, BLOCK_SIZES and SCALES.
    """
    block_sizes, scales = list(block_sizes), list(scales)
    for given, known, what in ((block_sizes, BLOCK_SIZES, "--block-sizes"), (scales, SCALES, "--scales")):
        for value in given:
            if value not in known:
                raise StageError(f"{what} must be of {', '.join(map(str, known))}, got {value}")
    found = []
    for codebook in codebooks:
        if codebook not in CODEBOOKS:
            raise StageError(f"--codebooks must be of {', '.join(CODEBOOKS)}, got {codebook}")
        if codebook in FORMATS:
            own = FORMATS[codebook]
            found.append(Variant(codebook, own.block_size or 64, own.scale_codebook or own.scales[0]))
        else:
            found += [Variant(codebook, size, scale) for size in block_sizes for scale in scales]
    return list(dict.fromkeys(found))
