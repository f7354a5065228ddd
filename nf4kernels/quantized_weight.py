"""A [N, K] matrix in 4 or 8 bits, QuantizedWeight, E of them, QuantizedExperts, and the rules of their tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

SUPERBLOCK = 256  # blocks that share one scale_absmax
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
INT8 = "int8"  # the one codebook of 256 levels
LEVELS, INT8_LEVELS = 16, 256  # of `code`: two codes a byte, or one, whose level is the byte as a signed integer
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the blocks' scales are: numbers in absmax, 8-bit codes of scale_code, or such codes that superblocks scale again.
SCALES = ("float32", "bfloat16", "float16", "codes", "double")
# A weight's part of every op's argument list, in the order of `ops.WEIGHT`: packed, absmax, scale_absmax, scale_offset,
# code, scale_code, N, K, block_size. A plain tuple: making a named one costs each call of a layer 0.7 us of 9.6.
WeightArgs: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, int, int, int]
Specs: TypeAlias = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]  # of a weight's tensors, by name
_AnyWeight = TypeVar("_AnyWeight", bound="_Quantized")


def packed_shape(N: int, K: int, levels: int = LEVELS) -> tuple[int, ...]:
    """Two codes a byte: `[N, K/2]`, or flat when K is odd and rows share bytes. A code of 256 levels takes a byte."""
    if levels == INT8_LEVELS:
        return (N, K)
    return (N, K // 2) if K % 2 == 0 else ((N * K + 1) // 2,)


def absmax_shape(N: int, K: int, block_size: int) -> tuple[int, ...]:
    """One scale a block: `[N, K/block_size]`, or flat when blocks straddle rows."""
    return (N, K // block_size) if K % block_size == 0 else (-(-N * K // block_size),)


def superblocks(N: int, K: int, block_size: int) -> int:
    blocks = -(-N * K // block_size)
    return -(-blocks // SUPERBLOCK)


def check_block_size(block_size: int, caller: str) -> None:
    if isinstance(block_size, float) or block_size not in BLOCK_SIZES:  # 64.0 is in it
        raise ValueError(f"{caller}: block_size must be one of {list(BLOCK_SIZES)}, got {block_size!r}")


def check_plain(weight: Tensor, who: str) -> None:
    """TypeError for a DTensor, by its method: to import them takes a third of a second."""
    if hasattr(weight, "to_local"):
        raise TypeError(
            f"{who}: weight must be a whole tensor (quantize first, then shard, or load_checkpoint with quantize=True),"
            " got a DTensor"
        )


def scales_of(absmax: Tensor, scale_absmax: Tensor | None, scale_code: Tensor | None) -> str:
    """The kind among SCALES, by the tensors that a weight has; the name of absmax' dtype where it is none of them."""
    if scale_code is None:
        return str(absmax.dtype).removeprefix("torch.")
    return "codes" if scale_absmax is None else "double"


def tensor_specs(N: int, K: int, block_size: int, scales: str, levels: int = LEVELS) -> Specs:
    """name -> (dtype, shape) of the six tensors of a weight; dtype None for those it lacks."""
    none = (None, ())
    double = scales == "double"
    absmax_dtype = torch.uint8 if scales in ("codes", "double") else getattr(torch, scales)
    return {
        "packed": (torch.uint8, packed_shape(N, K, levels)),
        "absmax": (absmax_dtype, absmax_shape(N, K, block_size)),
        "scale_absmax": (torch.float32, (superblocks(N, K, block_size),)) if double else none,
        "scale_offset": (torch.float32, ()) if double else none,
        "code": (torch.float32, (levels,)),
        "scale_code": (torch.float32, (256,)) if absmax_dtype == torch.uint8 else none,
    }


def shared_codebooks(scales: str) -> tuple[str, ...]:
    """The tensors that experts have in common; of all others, a scale_code that alone scales too, each has its own."""
    return ("code",) if scales == "codes" else ("code", "scale_code")


def expert_specs(E: int, N: int, K: int, block_size: int, scales: str, levels: int = LEVELS) -> Specs:
    """The same of E weights: each tensor of one, stacked, but for what `shared_codebooks` says."""
    shared = shared_codebooks(scales)
    return {
        name: (dtype, shape if dtype is None or name in shared else (E, *shape))
        for name, (dtype, shape) in tensor_specs(N, K, block_size, scales, levels).items()
    }


def expert_columns(block_size: int) -> int:
    """What an expert's K must be a multiple of, so that neither a block nor a kernel's 64 columns straddle rows."""
    return max(64, block_size)


def check_expert_columns(K: int, block_size: int, caller: str) -> None:
    step = expert_columns(block_size)
    if K % step:
        raise ValueError(f"{caller}: K must be a multiple of {step} at block_size={block_size}, got K={K}")


@dataclass(frozen=True, eq=False)
class _Quantized:
    """What both classes hold and check; `specs` and `SHAPE` tell them apart."""

    packed: Tensor
    absmax: Tensor
    scale_absmax: Tensor | None
    scale_offset: Tensor | None
    code: Tensor
    scale_code: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    codebook: str
    scale_codebook: str | None

    SHAPE: ClassVar[str]
    specs: ClassVar[Callable[..., Specs]]

    def __post_init__(self) -> None:
        who = f"nf4kernels.{type(self).__name__}"
        if len(self.shape) != self.SHAPE.count(",") + 1 or min(self.shape) < 0:
            raise ValueError(f"{who}: shape must be {self.SHAPE}, got {tuple(self.shape)}")
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if self.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"{who}: dtype must be float32, bfloat16 or float16, got {self.dtype}")
        check_block_size(self.block_size, who)
        if not isinstance(self.absmax, Tensor):
            raise TypeError(f"{who}: absmax must be a tensor, got {type(self.absmax).__name__}")
        if self.scales not in SCALES:
            expected = "float32, bfloat16 or float16 without a scale_code"
            raise TypeError(f"{who}: absmax must be {expected}, got {self.absmax.dtype}")
        levels = INT8_LEVELS if self.codebook == INT8 else LEVELS
        for name, (dtype, shape) in self.specs(*self.shape, self.block_size, self.scales, levels).items():
            tensor = getattr(self, name)
            if dtype is None:
                if tensor is not None:
                    raise ValueError(f"{who}: {name} must be None with {self.scales} scales, got a tensor")
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
    def scales(self) -> str:
        """What the blocks' scales are: one of SCALES."""
        return scales_of(self.absmax, self.scale_absmax, self.scale_code)

    @property
    def double_quant(self) -> bool:
        return self.scales == "double"

    @property
    def bits(self) -> int:
        """Of a code: 8 of "int8", 4 of every other codebook."""
        return 8 if self.codebook == INT8 else 4

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, codebooks included."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    def to(self: _AnyWeight, device: torch.device | str) -> _AnyWeight:
        """The same weight on another device; tensors already there are shared, not copied."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def op_args(self) -> WeightArgs:
        N, K = self.shape[-2:]
        return (
            self.packed, self.absmax, self.scale_absmax, self.scale_offset, self.code, self.scale_code, N, K,
            self.block_size,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class QuantizedWeight(_Quantized):
    """A frozen `[N, K]` weight: Ŵ[i] = code[code i] * scale(block i), blocks over the row-major flattened weight.

    `scales` says what scale is: absmax itself ("float32", "bfloat16", "float16"); `scale_code[absmax]` ("codes"); or,
    double-quantized, `scale_code[absmax] * scale_absmax[block // 256] + scale_offset`, each operation rounded to fp32.

    Attributes:
        packed: uint8 `[N, K/2]` (flat `[ceil(N*K/2)]` for odd K), the even element in the high nibble. Of "int8"
            `[N, K]`, bytes that are signed integers.
        absmax: `[N, K/block_size]` (flat when K % block_size != 0), fp32, bf16, fp16, or uint8 codes.
        scale_absmax: fp32 `[ceil(blocks/256)]`, or None without double quantization.
        scale_offset: fp32 scalar, or None without double quantization.
        code: fp32 `[16]`; of "int8" `[256]`, entry b the signed integer of byte b.
        scale_code: fp32 `[256]`, or None where absmax holds numbers.
        shape: (N, K).
        dtype: the dtype that was quantized, and the default of `dequantize`.
        block_size: a power of two from 16 to 4096.
        codebook: the name of `code`, or "custom".
        scale_codebook: the name of `scale_code`, "custom" for one read from a checkpoint, or None.
        column_order: int32 `[K]`, a permutation, or None: the bytes' column j is Ŵ's column column_order[j], as GPTQ's
            act-order leaves them. The ops below `op_args` know nothing of it; `dequantize` and `linear` do.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape or device; the message names it.
    """

    column_order: Tensor | None = None

    SHAPE = "(N, K)"
    specs = staticmethod(tensor_specs)

    def __post_init__(self) -> None:
        super().__post_init__()
        order = self.column_order
        if order is None:
            return
        K, who = self.shape[1], f"nf4kernels.{type(self).__name__}"
        if not isinstance(order, Tensor):
            raise TypeError(f"{who}: column_order must be a tensor or None, got {type(order).__name__}")
        if order.dtype != torch.int32 or tuple(order.shape) != (K,):
            expected = f"column_order must be int32 [{K}]"
            raise ValueError(f"{who}: {expected}, got {order.dtype} {list(order.shape)}")
        if order.device != self.packed.device:
            raise ValueError(f"{who}: column_order must be on {self.packed.device} as packed is, got {order.device}")


@dataclass(frozen=True, eq=False)
class QuantizedExperts(_Quantized):
    """A frozen `[E, N, K]` weight: expert e is a QuantizedWeight of its own, `experts[e]`, bit for bit.

    No block and no superblock straddles two experts, and each expert has a scale_offset of its own.

    Attributes:
        packed: uint8 `[E, N, K/2]`, the even element in the high nibble; of "int8" `[E, N, K]`.
        absmax: `[E, N, K/block_size]`, fp32, bf16, fp16, or uint8 codes.
        scale_absmax: fp32 `[E, ceil(N*K/block_size/256)]`, or None.
        scale_offset: fp32 `[E]`, or None.
        code, dtype, block_size, codebook, scale_codebook: as in `QuantizedWeight`, of all experts.
        scale_code: the same for all with double quantization; `[E, 256]` where it alone scales.
        shape: (E, N, K), K a multiple of 64 and of block_size.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape or device; the message names it.
    """

    SHAPE = "(E, N, K)"
    specs = staticmethod(expert_specs)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_expert_columns(self.shape[2], self.block_size, "nf4kernels.QuantizedExperts")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> QuantizedWeight:
        """One expert's weight; shares memory."""
        if not isinstance(expert, int):
            raise TypeError(f"nf4kernels.QuantizedExperts: expert must be an int, got {type(expert).__name__}")
        if not -len(self) <= expert < len(self):
            raise IndexError(f"nf4kernels.QuantizedExperts: expert must be one of {len(self)}, got {expert}")
        shared = shared_codebooks(self.scales)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {
            name: value[expert] for name, value in values.items() if isinstance(value, Tensor) and name not in shared
        }
        return QuantizedWeight(**values | own | {"shape": self.shape[1:]})

    def __iter__(self) -> Iterator[QuantizedWeight]:
        return (self[expert] for expert in range(len(self)))


def stack_experts(qweights: Sequence[QuantizedWeight]) -> QuantizedExperts:
    """At least one weight, all of one shape and one kind of scales and codebooks, as experts; copies."""
    first = qweights[0]
    shared = shared_codebooks(first.scales)
    values: dict[str, Any] = {field.name: getattr(first, field.name) for field in fields(QuantizedExperts)}
    for name, value in values.items():
        if isinstance(value, Tensor) and name not in shared:
            values[name] = torch.stack([getattr(each, name) for each in qweights])
    return QuantizedExperts(**values | {"shape": (len(qweights), *first.shape)})


def is_permutation(order: Tensor) -> bool:
    """Whether an order of columns is one; true of what has no values here."""
    if order.is_meta or type(order) is not Tensor:
        return True
    return torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device))
