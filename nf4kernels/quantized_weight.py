"""QuantizedWeight: a [N, K] matrix in 4 bits, and the rules its tensors keep."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SUPERBLOCK = 256  # blocks that share one scale_absmax
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_shape(N: int, K: int) -> tuple[int, ...]:
    """Two codes a byte: `[N, K/2]`, or flat when K is odd and rows share bytes."""
    return (N, K // 2) if K % 2 == 0 else ((N * K + 1) // 2,)


def absmax_shape(N: int, K: int, block_size: int) -> tuple[int, ...]:
    """One scale a block: `[N, K/block_size]`, or flat when blocks straddle rows."""
    return (N, K // block_size) if K % block_size == 0 else (-(-N * K // block_size),)


def superblocks(N: int, K: int, block_size: int) -> int:
    blocks = -(-N * K // block_size)
    return -(-blocks // SUPERBLOCK)


def check_block_size(block_size: int, caller: str) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{caller}: block_size must be one of {list(BLOCK_SIZES)}, got {block_size!r}")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A frozen `[N, K]` weight: Ŵ[i] = code[nibble i] * scale(block i), blocks over the row-major flattened weight.

    Without double quantization `scale = absmax` (fp32); with it
    `scale = scale_code[absmax] * scale_absmax[block // 256] + scale_offset`, each operation rounded to fp32.

    Attributes:
        packed: uint8 `[N, K/2]` (flat `[ceil(N*K/2)]` for odd K), the even element in the high nibble.
        absmax: `[N, K/block_size]` (flat when K % block_size != 0), fp32, or uint8 with double quantization.
        scale_absmax: fp32 `[ceil(blocks/256)]`, or None.
        scale_offset: fp32 scalar, or None.
        code: fp32 `[16]`.
        scale_code: fp32 `[256]`, or None.
        shape: (N, K).
        dtype: the dtype that was quantized, and the default of `dequantize`.
        block_size: a power of two from 32 to 4096.
        codebook: the name of `code`, or "custom".
        scale_codebook: the name of `scale_code`, "custom" for one read from a checkpoint, or None.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape or device; the message names it.
    """

    packed: Tensor
    absmax: Tensor
    scale_absmax: Tensor | None
    scale_offset: Tensor | None
    code: Tensor
    scale_code: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int
    codebook: str
    scale_codebook: str | None

    def __post_init__(self) -> None:
        who = "nf4kernels.QuantizedWeight"
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"{who}: shape must be (N, K), got {tuple(self.shape)}")
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        if self.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"{who}: dtype must be float32, bfloat16 or float16, got {self.dtype}")
        check_block_size(self.block_size, who)
        for name, (dtype, shape) in tensor_specs(*self.shape, self.block_size, self.double_quant).items():
            tensor = getattr(self, name)
            if dtype is None:
                if tensor is not None:
                    raise ValueError(f"{who}: {name} must be None without double quantization, got a tensor")
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{who}: {name} must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype != dtype:
                raise TypeError(f"{who}: {name} must be {dtype}, got {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{who}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if not tensor.is_contiguous():
                raise ValueError(f"{who}: {name} must be contiguous, got strides {list(tensor.stride())}")
            if tensor.device != self.packed.device:
                raise ValueError(f"{who}: {name} must be on {self.packed.device} as packed is, got {tensor.device}")

    @property
    def double_quant(self) -> bool:
        return self.scale_code is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, codebooks included."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same weight on another device; tensors already there are shared, not copied."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})

    def op_args(self) -> tuple:
        """The weight's part of every op's argument list, see `ops.WEIGHT`."""
        return (
            self.packed, self.absmax, self.scale_absmax, self.scale_offset, self.code, self.scale_code,
            *self.shape, self.block_size,
        )  # fmt: skip


def tensor_specs(N: int, K: int, block_size: int, double_quant: bool) -> dict:
    """name -> (dtype, shape) of the six tensors of a weight; (None, None) for those it lacks."""
    none = (None, None)
    return {
        "packed": (torch.uint8, packed_shape(N, K)),
        "absmax": (torch.uint8 if double_quant else torch.float32, absmax_shape(N, K, block_size)),
        "scale_absmax": (torch.float32, (superblocks(N, K, block_size),)) if double_quant else none,
        "scale_offset": (torch.float32, ()) if double_quant else none,
        "code": (torch.float32, (16,)),
        "scale_code": (torch.float32, (256,)) if double_quant else none,
    }
