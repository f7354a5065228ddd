"""The weight codebooks of 16 levels, int8's of 256, the 256-level scale codebooks, and how each is built.

A codebook is data: every kernel takes it as a run-time argument, and no kernel knows which one it is. int8's levels are
their bytes as signed integers, which its kernels convert and never look up: of that codebook they read the size alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.special import ndtri  # what scipy.stats.norm.ppf evaluates, without scipy.stats' import time
from torch import Tensor

from .quantized_weight import INT8, INT8_LEVELS, LEVELS

NF4_OFFSET = 0.9677083  # outermost quantile, QLoRA (arXiv 2305.14314), appendix E


def normal_float(bits: int = 4) -> Tensor:
    """The `2**bits` levels of NormalFloat: quantiles of N(0, 1) with an exact 0, normalised to [-1, 1].

    `2**(bits-1)` positive and `2**(bits-1) - 1` negative quantiles. In float32 and this order of operations `bits=4`
    equals the published NF4 table bit for bit.

    Args:
        bits: 2 to 8.

    Returns:
        fp32 `[2**bits]`, ascending.

    Raises:
        ValueError: `bits` is out of range.

    Source: QLoRA (arXiv 2305.14314), section 3 and appendix E.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"nf4kernels.codebook.normal_float: bits must be 2 to 8, got {bits}")
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        probabilities = torch.linspace(NF4_OFFSET, 0.5, count + 1)[:-1]
        return torch.from_numpy(ndtri(probabilities.double().numpy())).float()

    levels = torch.cat([quantiles(half), torch.zeros(1), -quantiles(half - 1)]).sort().values
    return levels / levels.max()


def _fp4() -> Tensor:
    """E2M1 with bitsandbytes' subnormal, in its code order: sign in bit 3, magnitudes not sorted."""
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3])
    return torch.cat([magnitudes, -magnitudes]) / 12 + 0.0  # + 0.0 turns -0.0 into 0.0


def _int4() -> Tensor:
    steps = torch.arange(8, dtype=torch.float32)
    return torch.cat([-steps.flip(0), steps]) / 7 + 0.0


def _e2m1() -> Tensor:
    """E2M1 as the OCP and NVIDIA formats have it: sign in bit 3, and a zero of either sign."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return torch.cat([magnitudes, -magnitudes])


def e4m3_numbers() -> Tensor:
    """fp32 `[256]`: entry b is the FP8 E4M3 number with bit pattern b; the two NaN patterns read as 0."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(nan=0.0)


def _e8m0() -> Tensor:
    """Entry b is 2^(b - 127), of which b = 255 is NaN."""
    return torch.cat([torch.ldexp(torch.ones(255), torch.arange(-127, 128)), torch.tensor([torch.nan])])


def _dynamic8() -> Tensor:
    """The signed dynamic map: i exponent zeros leave i fraction bits, for i of 0..6 (arXiv 1511.04561)."""
    positive = []
    for i in range(7):
        boundaries = torch.linspace(0.1, 1, 2**i + 1)
        means = (boundaries[:-1] + boundaries[1:]) / 2
        positive += (10 ** (i - 6) * means).tolist()
    return torch.tensor(sorted([-v for v in positive] + [0.0, 1.0] + positive), dtype=torch.float32)


NF4 = normal_float(4)
FP4 = _fp4()
INT4 = _int4()
# AbnormalFloat for blocks of 64, arXiv 2306.06965, table 3: the published optimum has no closed form.
AF4 = torch.tensor(
    [-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
     0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0]
)  # fmt: skip
# The levels of ggml's IQ4_NL, times 127 or so: integers, beside a scale in fp16.
IQ4_NL = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
E2M1 = _e2m1()
INTEGERS = torch.arange(-8.0, 8.0)
INT8_MOST = 127  # -128 is a level that is never chosen, so that the levels in use are symmetric
INT8_CODE = torch.arange(256, dtype=torch.uint8).view(torch.int8).float()  # entry b: byte b as a signed integer


@dataclass(frozen=True)
class Format:
    """What a published 4-bit format fixes besides its levels.

    Attributes:
        scales: the kinds of scales that it may have, as `QuantizedWeight.scales` names them; what `quantize` writes
            first.
        block_size: its own, None where a file says it.
        scale_codebook: the name of the codebook of 8-bit scales, None where scales are numbers.
    """

    scales: tuple[str, ...]
    block_size: int | None
    scale_codebook: str | None = None


# name -> Format of the codebooks that bring more than their levels: OCP MX 1.0; NVIDIA's NVFP4; symmetric integers as
# GPTQ, AutoRound and compressed-tensors store them; ggml's Q4_0 and IQ4_NL.
FORMATS = {
    "mxfp4": Format(("codes",), 32, "e8m0"),
    "nvfp4": Format(("codes",), 16, "e4m3_global"),
    "int4_symmetric": Format(("bfloat16", "float16", "float32"), None),
    "q4_0": Format(("float16",), 32),
    "iq4_nl": Format(("float16",), 32),
}
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4, "af4": AF4, INT8: INT8_CODE} | {
    "mxfp4": E2M1, "nvfp4": E2M1, "int4_symmetric": INTEGERS, "q4_0": INTEGERS, "iq4_nl": IQ4_NL,
}  # fmt: skip
# "e4m3_global", E4M3 numbers times one fp32 a tensor, is a codebook of its own for each tensor.
SCALE_CODEBOOKS = {"e4m3": e4m3_numbers() / 448, "dynamic8": _dynamic8(), "e8m0": _e8m0()}
DOUBLE_QUANT_CODEBOOKS = ("e4m3", "dynamic8")  # of scales that superblocks scale once more


def resolve(codebook: str | Tensor, caller: str) -> tuple[str, Tensor]:
    """(name, fp32 `[16]`) of a codebook given by name or as 16 levels; the levels are copied. int8 has `[256]`.

    Raises:
        TypeError: not a name and not a floating-point tensor.
        ValueError: an unknown name; not 16 finite, ascending levels in [-1, 1].
    """
    if isinstance(codebook, str):
        if codebook not in CODEBOOKS:
            raise ValueError(f"{caller}: codebook must be one of {sorted(CODEBOOKS)} or 16 levels, got {codebook!r}")
        return codebook, CODEBOOKS[codebook].clone()
    if not isinstance(codebook, Tensor) or not codebook.is_floating_point():
        kind = codebook.dtype if isinstance(codebook, Tensor) else type(codebook).__name__
        raise TypeError(f"{caller}: codebook must be a name or a floating-point tensor of 16 levels, got {kind}")
    levels = codebook.detach().float().clone()
    if levels.shape != (16,):
        raise ValueError(f"{caller}: codebook must have 16 levels, got shape {list(levels.shape)}")
    if not (levels.isfinite().all() and levels.abs().max() <= 1 and (levels.diff() >= 0).all()):
        raise ValueError(f"{caller}: codebook must be 16 ascending levels in [-1, 1], got {levels.tolist()}")
    return "custom", levels


def resolve_scale(scale_codebook: str, caller: str) -> Tensor:
    """fp32 `[256]` of a scale codebook's name; ValueError for an unknown one."""
    if scale_codebook not in DOUBLE_QUANT_CODEBOOKS:
        known = sorted(DOUBLE_QUANT_CODEBOOKS)
        raise ValueError(f"{caller}: scale_codebook must be one of {known}, got {scale_codebook!r}")
    return SCALE_CODEBOOKS[scale_codebook].clone()


def name_of(levels: Tensor, known: Mapping[str, Tensor]) -> str:
    """The name among CODEBOOKS or SCALE_CODEBOOKS of stored levels, on any device; "custom" where they have none."""
    host = levels.cpu()
    return next((name for name, each in known.items() if torch.equal(each.nan_to_num(), host.nan_to_num())), "custom")


def default_block_size(codebook: str | Tensor) -> int:
    """What `quantize` takes where no block size is given."""
    own = FORMATS.get(codebook) if isinstance(codebook, str) else None
    return own.block_size if own is not None and own.block_size is not None else 64


def levels_of(codebook: str) -> int:
    """How many levels the codebook of that name has; "custom" has 16."""
    return INT8_LEVELS if codebook == INT8 else LEVELS
