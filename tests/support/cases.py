"""The shapes, layouts and inputs that the tests share."""

import dataclasses
import itertools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from nf4kernels import QuantizedExperts, QuantizedWeight, codebook, reference
from nf4kernels.backends.select import CPU_LIBRARY as LIBRARY
from nf4kernels.quantized_weight import absmax_shape, packed_shape, tensor_specs

ARM = platform.machine() == "aarch64"
ISAS = ("scalar", "neon", "neon_bf16") if ARM else ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
# What the ops run here, each in turn. `test_backends.py` holds a skip for each instruction set that is missing.
IMPLEMENTATIONS = ("reference",) if LIBRARY is None else tuple(LIBRARY.isas)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# Rows of x: none, one, and around the register and cache tiles of a GEMM.
ROWS = (0, 1, 2, 3, 4, 5, 7, 12, 13, 16, 17, 64, 129)

# (N, K): one block or less, blocks that straddle rows, odd K (rows share a byte), odd N, and more than one of any tile.
SHAPES = (
    (1, 1),
    (3, 5),
    (1, 32),
    (17, 32),
    (5, 63),
    (16, 64),
    (33, 65),
    (64, 96),
    (37, 100),
    (129, 31),
    (31, 129),
    (100, 576),
    (48, 320),
    (96, 128),
    (50, 1090),
    (130, 1000),
    (256, 512),
    (19, 2080),
    (300, 192),
    (35, 1088),
)
EMPTY_SHAPES = ((0, 64), (0, 7), (5, 0), (0, 0))

CUSTOM_CODE = torch.tensor(
    [-1, -0.8, -0.5, -0.41, -0.3, -0.2, -0.1, -0.02, 0.03, 0.11, 0.25, 0.4, 0.45, 0.7, 0.71, 0.9], dtype=torch.float32
)


def shape_id(shape: tuple) -> str:
    return "x".join(map(str, shape))


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Layout:
    """How a weight is stored."""

    block_size: int = 64
    codebook: str = "nf4"
    scale_codebook: str | None = "e4m3"  # None: absmax holds numbers
    numbers: str = "float32"  # of which type

    def __str__(self) -> str:
        return f"bs{self.block_size}-{self.codebook}-{self.scale_codebook or NAMES[self.numbers]}"

    @property
    def scales(self) -> str:
        """As `QuantizedWeight.scales`."""
        if self.scale_codebook is None:
            return self.numbers
        return "double" if self.scale_codebook in codebook.DOUBLE_QUANT_CODEBOOKS else "codes"

    @property
    def code(self) -> Tensor:
        return CUSTOM_CODE if self.codebook == "custom" else codebook.CODEBOOKS[self.codebook]

    @property
    def options(self) -> dict:
        """The same as keyword arguments of `nf4kernels.quantize`."""
        options = {"codebook": CUSTOM_CODE if self.codebook == "custom" else self.codebook}
        options |= {"block_size": self.block_size, "double_quant": self.scale_codebook is not None}
        return options | ({"scale_codebook": self.scale_codebook} if self.scale_codebook else {})


DEFAULT = Layout()
# Every value of every field, and the pairs that share code in a kernel.
LAYOUTS = (
    DEFAULT,
    Layout(scale_codebook=None),
    Layout(scale_codebook="dynamic8"),
    *(Layout(block_size=b) for b in BLOCK_SIZES[1:] if b != 64),
    Layout(32, scale_codebook=None),
    Layout(4096, scale_codebook=None),
    *(Layout(codebook=c) for c in ("fp4", "int4", "af4", "custom")),
    Layout(128, "custom", None),
    Layout(256, "fp4", "dynamic8"),
    Layout(16, scale_codebook=None),
)
# The published formats, and what else their levels, scales and short blocks can meet in a kernel.
FORMATS = (
    Layout(32, "mxfp4", "e8m0"),
    Layout(16, "nvfp4", "e4m3_global"),
    Layout(128, "int4_symmetric", None, "bfloat16"),
    Layout(32, "q4_0", None, "float16"),
    Layout(32, "iq4_nl", None, "float16"),
    Layout(16, "int4_symmetric", None, "bfloat16"),
    Layout(16, "iq4_nl", None),
    Layout(64, "nvfp4", "e4m3_global"),
    Layout(16, "nf4", "e4m3"),
)


def weight(N: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian, rows of different size as in a real layer, so that a scale from another block shows."""
    generator = torch.Generator().manual_seed(seed + 1000 * N + K)
    w = torch.randn(N, K, generator=generator) * (0.02 + torch.rand(N, 1, generator=generator))
    return w.to(dtype)


def from_parts(packed: Tensor, absmax: Tensor, shape: tuple[int, int], layout: Layout, dtype=torch.bfloat16):
    """The QuantizedWeight of codes and fp32 absmax; the reference encodes the scales where layout says so."""
    scale_absmax = scale_offset = scale_code = None
    if layout.scale_codebook:
        scale_code = codebook.SCALE_CODEBOOKS[layout.scale_codebook].clone()
        absmax, scale_absmax, scale_offset = reference.quantize_absmax(
            absmax, scale_code, layout.scale_codebook == "e4m3"
        )
    return QuantizedWeight(
        packed, absmax, scale_absmax, scale_offset, layout.code.clone(), scale_code, shape, dtype, layout.block_size,
        layout.codebook, layout.scale_codebook,
    )  # fmt: skip


def quantized(N: int, K: int, layout: Layout = DEFAULT, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    """A quantized Gaussian weight, made by the reference, so that a wrong `quantize` cannot hide a wrong product."""
    return quantized_from(weight(N, K), layout, dtype)


def quantized_from(w: Tensor, layout: Layout = DEFAULT, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    if layout.codebook in codebook.FORMATS:
        return in_format(w, layout, dtype)
    return from_parts(*reference.quantize(w, layout.code, layout.block_size), tuple(w.shape), layout, dtype)


def scale_code_of(layout: Layout, size: float = 1.0) -> Tensor | None:
    """fp32 `[256]`, or None; of "e4m3_global" the tables of two tensors of about `size`, told apart by bit 7."""
    if layout.scale_codebook is None:
        return None
    if layout.scale_codebook != "e4m3_global":
        return codebook.SCALE_CODEBOOKS[layout.scale_codebook].clone()
    numbers = codebook.e4m3_numbers()[:128]
    return torch.cat([numbers * (size / 448), numbers * (size * 1.37 / 448)])


def in_format(w: Tensor, layout: Layout, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    """w by the nearest level under a nearby scale, of whatever kind; of a table of two halves, by the second half."""
    N, K = w.shape
    blocks = torch.nn.functional.pad(w.float().reshape(-1), (0, -w.numel() % layout.block_size))
    blocks = blocks.view(-1, layout.block_size)
    wanted, scale_code = blocks.abs().amax(1) / layout.code.abs().max(), scale_code_of(layout, w.abs().max().item())
    if scale_code is None:
        absmax = wanted.to(getattr(torch, layout.numbers))
        scales = absmax.float()
    else:
        distance = (scale_code[None, 128 if layout.scale_codebook == "e4m3_global" else 0 :] - wanted[:, None]).abs()
        absmax = (distance.nan_to_num(torch.inf).argmin(1) + 256 - distance.shape[1]).to(torch.uint8)
        absmax[::3] &= 127  # of the first half now and then
        scales = scale_code[absmax.long()]
    codes = (blocks[..., None] - layout.code * scales[:, None, None]).abs().argmin(-1).view(-1)[: N * K]
    codes = torch.nn.functional.pad(codes, (0, N * K % 2)).to(torch.uint8)
    return QuantizedWeight(
        (codes[::2] << 4 | codes[1::2]).view(packed_shape(N, K)), absmax.view(absmax_shape(N, K, layout.block_size)),
        None, None, layout.code.clone(), scale_code, (N, K), dtype, layout.block_size, layout.codebook,
        layout.scale_codebook,
    )  # fmt: skip


def expert_weights(E: int, N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[E, N, K], each expert of another size, so that a scale from another expert shows."""
    experts = [weight(N, K, seed=e) * 2.0 ** (e % 5) for e in range(E)]
    return torch.stack(experts).to(dtype) if experts else torch.empty(0, N, K, dtype=dtype)


def stacked(qweights: list[QuantizedWeight]) -> QuantizedExperts:
    """The experts whose slices are these."""
    first = qweights[0]
    tensors = {
        name: None if getattr(first, name) is None else torch.stack([getattr(q, name) for q in qweights])
        for name in ("packed", "absmax", "scale_absmax", "scale_offset")
    }
    each = first.scales == "codes" and first.scale_code is not None
    scale_code = torch.stack([q.scale_code for q in qweights]) if each else first.scale_code
    return QuantizedExperts(
        **tensors, code=first.code, scale_code=scale_code, shape=(len(qweights), *first.shape), dtype=first.dtype,
        block_size=first.block_size, codebook=first.codebook, scale_codebook=first.scale_codebook,
    )  # fmt: skip


def quantized_experts(
    E: int, N: int, K: int, layout: Layout = DEFAULT, dtype: torch.dtype = torch.bfloat16
) -> QuantizedExperts:
    """`quantized` of each of `expert_weights`."""
    return stacked([quantized_from(w, layout, dtype) for w in expert_weights(E, N, K)])


def with_tensors(qweight: QuantizedWeight, **tensors: Tensor) -> QuantizedWeight:
    return dataclasses.replace(qweight, **tensors)


def random_bytes(N: int, K: int, layout: Layout = DEFAULT) -> QuantizedWeight:
    """A weight of random bytes: every nibble in every position and every scale index, whatever an encoder would do."""
    generator = torch.Generator().manual_seed(7 + 1000 * N + K)
    tensors = {}
    for name, (dtype, shape) in tensor_specs(N, K, layout.block_size, layout.scales, layout.code.numel()).items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        elif dtype in HALVES:  # every finite number, subnormal ones too
            most = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
            tensors[name] = torch.randint(0, most + 1, shape, generator=generator, dtype=torch.int16).view(dtype)
        elif dtype is not None:
            tensors[name] = torch.rand(shape, generator=generator) + 0.01
        else:
            tensors[name] = None
    tensors["code"] = layout.code.clone()
    tensors["scale_code"] = scale_code_of(layout, 0.7)
    return QuantizedWeight(
        **tensors, shape=(N, K), dtype=torch.bfloat16, block_size=layout.block_size, codebook=layout.codebook,
        scale_codebook=layout.scale_codebook,
    )  # fmt: skip


def uneven(N: int, K: int, zeros: bool = True) -> QuantizedWeight:
    """Scales up to 10^6 apart, some of them zero; without zeros, falling to 2^-9 within four blocks.

    The largest of every row are as large, so that no few columns of the output make up its error.
    """
    qweight = quantized(N, K, Layout(scale_codebook=None))
    generator = torch.Generator().manual_seed(N * K)
    factors = torch.randn(qweight.absmax.shape, generator=generator).mul(3).clamp(-10, 10).exp2()
    factors /= factors.amax(dim=-1, keepdim=True)
    if zeros:
        factors[torch.rand(factors.shape, generator=generator) < 0.1] = 0
    else:
        factors = 2.0 ** -(torch.arange(factors.numel()) % 4 * 3.0).view(factors.shape)
    return with_tensors(qweight, absmax=qweight.absmax * factors)


def activations(M: int, K: int, dtype: torch.dtype, mean: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * M + K)
    return (torch.randn(M, K, generator=generator) + mean).to(dtype)


def dense(qweight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ŵ by the reference."""
    N, K = qweight.shape
    return reference.dequantize(*qweight.op_args(), 0, N, 0, K, dtype)


def paired(shapes, layouts):
    """Every shape and every layout at least once, without their product: (shape, layout) round robin."""
    count = max(len(shapes), len(layouts))
    return tuple(itertools.islice(zip(itertools.cycle(shapes), itertools.cycle(layouts)), count))
