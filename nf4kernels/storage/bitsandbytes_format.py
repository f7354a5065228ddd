"""One weight in bitsandbytes' format: its tensors by name, and the metadata beside them; nothing else knows the names.

An NF4 or FP4 weight is written as bitsandbytes writes it; a weight of another codebook has the same tensors and says so
in the name of its metadata.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codebook import CODEBOOKS, FORMATS, SCALE_CODEBOOKS, levels_of, name_of
from ..quantized_weight import (
    SUPERBLOCK,
    WEIGHT_DTYPES,
    QuantizedWeight,
    absmax_shape,
    check_block_size,
    is_permutation,
    packed_shape,
)

BITSANDBYTES_CODEBOOKS = ("nf4", "fp4")
STATE = ".quant_state."
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "column_order")
# bitsandbytes 0.50 undoes that order when it saves, but not the scales', and then decodes other weights itself
REPACKED = (
    "as bitsandbytes leaves a weight that it has reordered for a CPU with AVX512-BF16: save the model before its first"
    " forward"
)


@dataclass(frozen=True)
class StoredWeight:
    """What the metadata beside a stored weight says of it."""

    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int
    codebook: str
    double_quant: bool
    scale_codebook: str | None = None  # of 8-bit scales that are not double-quantized
    has_column_order: bool = False

    def sizes(self, key: str) -> dict[str, int]:
        """name -> elements of each tensor that stands for it on disk; bytes of the packed one, whatever its dtype."""
        blocks = math.prod(absmax_shape(*self.shape, self.block_size))
        levels = levels_of(self.codebook)
        packed = math.prod(packed_shape(*self.shape, levels))
        sizes = {key: packed, f"{key}.absmax": blocks, f"{key}.quant_map": levels}
        if self.double_quant:
            sizes[f"{key}.nested_absmax"] = -(-blocks // SUPERBLOCK)
        if self.double_quant or self.scale_codebook is not None:
            sizes[f"{key}.nested_quant_map"] = 256
        if self.has_column_order:
            sizes[f"{key}.column_order"] = self.shape[1]
        return sizes


def weight_to_tensors(qweight: QuantizedWeight, key: str = "weight", bitsandbytes: bool = False) -> dict[str, Tensor]:
    """The tensors that stand for a weight on disk, by bitsandbytes' names: `key`, `key.absmax`, `key.quant_map`, ...

    nf4 and fp4 are bitsandbytes' own format, whichever the scale codebook; other codebooks have the same tensors, with
    the metadata under `key.quant_state.nf4kernels__<name>`. Scales in 16 bits stay so; 8-bit ones that are not
    double-quantized have a `key.nested_quant_map` alone, and a permutation of the columns is `key.column_order`. Reads
    back exactly. Shares memory with `qweight`.

    Args:
        qweight: the weight.
        key: its name in the file.
        bitsandbytes: insist on a weight that bitsandbytes can read.

    Raises:
        ValueError: `bitsandbytes` is set and the codebook is neither nf4 nor fp4, the scales are of another kind than
            its two, the columns are permuted, or blocks are below 32.
    """
    order = qweight.column_order
    is_theirs = qweight.scales in ("float32", "double") and order is None
    known = qweight.codebook in BITSANDBYTES_CODEBOOKS and is_theirs
    if bitsandbytes and not known:
        came = repr(qweight.codebook) if is_theirs else f"{qweight.scales} scales or permuted columns"
        raise ValueError(
            f"nf4kernels.weight_to_tensors: codebook must be 'nf4' or 'fp4' in bitsandbytes' format, got {came}"
        )
    if bitsandbytes and qweight.block_size < 32:
        raise ValueError(
            "nf4kernels.weight_to_tensors: block_size must be 32 to 4096 in bitsandbytes' format, got"
            f" {qweight.block_size}"
        )
    metadata: dict[str, Any] = {
        "quant_type": qweight.codebook,
        "blocksize": qweight.block_size,
        "dtype": str(qweight.dtype).removeprefix("torch."),
        "shape": list(qweight.shape),
    }
    tensors = {
        key: qweight.packed.reshape(-1, 1),
        f"{key}.absmax": qweight.absmax.reshape(-1),
        f"{key}.quant_map": qweight.code,
    }
    scale_absmax, scale_offset = qweight.scale_absmax, qweight.scale_offset
    if qweight.scale_code is not None:
        tensors[f"{key}.nested_quant_map"] = qweight.scale_code
    if order is not None:
        tensors[f"{key}.column_order"] = order
        metadata["column_order"] = True
    if qweight.scales == "codes":
        metadata["scale_codebook"] = qweight.scale_codebook
    if scale_absmax is not None and scale_offset is not None:
        tensors[f"{key}.nested_absmax"] = scale_absmax
        metadata["nested_blocksize"] = SUPERBLOCK
        metadata["nested_dtype"] = "float32"
        metadata["nested_offset"] = scale_offset.item()
    owner = "bitsandbytes" if known else "nf4kernels"
    text = json.dumps(metadata).encode()
    tensors[f"{key}{STATE}{owner}__{qweight.codebook}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def weight_from_tensors(tensors: dict[str, Tensor], key: str = "weight") -> QuantizedWeight:
    """The weight that `weight_to_tensors` or bitsandbytes stored as `key`; the same bits, on key's device.

    Any `quant_storage` dtype is read as the bytes it holds. Keys of other tensors are ignored. Shares memory.

    Raises:
        TypeError, ValueError: a tensor is missing or has another dtype or shape than the metadata says, or the metadata
            is damaged or of a kind that is not supported. Every message names the key.
    """
    who = "nf4kernels.weight_from_tensors"
    state = _state_of(tensors, key, who)
    for name in [key, f"{key}.absmax", f"{key}.quant_map"]:
        if name not in tensors:
            raise ValueError(f"{who}: tensors must have {name}, got none")
    metadata = _read_metadata(tensors[state], state, who)
    (N, K), block_size = metadata["shape"], metadata["blocksize"]
    codebook = state.rpartition("__")[2]
    code = _read_code(tensors[f"{key}.quant_map"], codebook, f"{key}.quant_map", who)

    packed = tensors[key].contiguous().reshape(-1).view(torch.uint8)
    packed = _shaped(packed, packed_shape(N, K, code.numel()), key, who)
    absmax = tensors[f"{key}.absmax"]
    if list(absmax.shape) == [K // block_size, N] and min(absmax.shape) > 1 and _owner(state) == "bitsandbytes":
        raise ValueError(f"{who}: {key}.absmax must have one dimension, got {list(absmax.shape)}, {REPACKED}")
    absmax = _shaped(absmax, absmax_shape(N, K, block_size), f"{key}.absmax", who)
    scale_absmax = scale_offset = scale_code = scale_codebook = None
    if "nested_offset" in metadata:
        for name in [f"{key}.nested_absmax", f"{key}.nested_quant_map"]:
            if name not in tensors:
                raise ValueError(f"{who}: tensors must have {name}, got none")
        scale_absmax = tensors[f"{key}.nested_absmax"].reshape(-1)
        scale_offset = torch.tensor(metadata["nested_offset"], dtype=torch.float32, device=packed.device)
        scale_code = tensors[f"{key}.nested_quant_map"].reshape(-1)
        scale_codebook = name_of(scale_code, SCALE_CODEBOOKS)
    elif "scale_codebook" in metadata:
        if f"{key}.nested_quant_map" not in tensors:
            raise ValueError(f"{who}: tensors must have {key}.nested_quant_map, got none")
        scale_code, scale_codebook = tensors[f"{key}.nested_quant_map"].reshape(-1), metadata["scale_codebook"]
    order = None
    if metadata.get("column_order"):
        if f"{key}.column_order" not in tensors:
            raise ValueError(f"{who}: tensors must have {key}.column_order, got none")
        order = tensors[f"{key}.column_order"]
        if not is_permutation(order):
            raise ValueError(f"{who}: {key}.column_order must be a permutation of the columns, got none")
    try:
        return QuantizedWeight(
            packed, absmax, scale_absmax, scale_offset, code, scale_code, (N, K), metadata["dtype"], block_size,
            codebook, scale_codebook, order,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}: {key}: {error}") from None


def name_of_scale_code(scale_code: Tensor, codebook: str) -> str:
    """Of stored 8-bit scales: the format's own, of which each tensor may have its own numbers, or by their levels."""
    own = FORMATS[codebook].scale_codebook if codebook in FORMATS else None
    is_own = own is not None and (own not in SCALE_CODEBOOKS or scale_code.is_meta)
    return own if own is not None and is_own else name_of(scale_code, SCALE_CODEBOOKS)


def stored_weights(names: Iterable[str]) -> dict[str, list[str]]:
    """The key of each 4-bit weight -> the names of its tensors, among the names of a file's, in one pass over them."""
    names = list(names)
    states = {name: name.rpartition(STATE)[0] for name in names if STATE in name}
    found: dict[str, list[str]] = {key: [] for key in states.values()}
    for name in names:
        owner, _, part = name.rpartition(".")
        key = states.get(name, name if part not in PARTS or name in found else owner)
        if key in found:
            found[key].append(name)
    return found


def stored_weight(names: Iterable[str], read: Callable[[str], Tensor], key: str, who: str) -> StoredWeight:
    """What is stored as `key`, by its metadata alone, which is the one tensor that is read; `names` are its tensors'.

    Raises ValueError as `weight_from_tensors` does; `who` names the caller.
    """
    state = _state_of(names, key, who)
    metadata = _read_metadata(read(state), state, who)
    return StoredWeight(
        tuple(metadata["shape"]), metadata["dtype"], metadata["blocksize"], state.rpartition("__")[2],
        "nested_offset" in metadata, metadata.get("scale_codebook"), bool(metadata.get("column_order")),
    )  # fmt: skip


def _state_of(names: Iterable[str], key: str, who: str) -> str:
    """The name of the metadata beside a weight."""
    states = [name for name in names if name.startswith(key + STATE)]
    if len(states) != 1:
        raise ValueError(f"{who}: tensors must have one {key}{STATE}* entry, got {states or 'none'}")
    return states[0]


def _owner(state: str) -> str:
    """Whose format the metadata of that name is of."""
    return state.rpartition(STATE)[2].partition("__")[0]


def check_no_lone_part(names: Collection[str], keys: Collection[str], who: str) -> None:
    """ValueError where a tensor has a part of a 4-bit weight beside it and is none of `keys`, which have metadata."""
    all_names, with_metadata = set(names), set(keys)
    for name in names:
        key, _, part = name.rpartition(".")
        if part in PARTS and key in all_names and key not in with_metadata:
            raise ValueError(f"{who}: the checkpoint must have {key}{STATE}* beside {name}, got none")


def _read_metadata(tensor: Tensor, name: str, who: str) -> dict:
    """The JSON beside a weight, with dtype as a torch.dtype; ValueError for what does not fit the format."""
    try:
        metadata = json.loads(bytes(tensor.cpu().numpy()).decode())
        shape, block_size = metadata["shape"], metadata["blocksize"]
        dtype = getattr(torch, metadata["dtype"], None)
        quant_type = metadata["quant_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{who}: {name} must hold a quant_state in JSON, got {type(error).__name__}: {error}"
        ) from None
    sizes = isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n >= 0 for n in shape)
    if not sizes:
        raise ValueError(f"{who}: shape in {name} must be [N, K], got {shape}")
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{who}: dtype in {name} must be float32, bfloat16 or float16, got {metadata['dtype']!r}")
    owner, codebook = _owner(name), name.rpartition("__")[2]
    names = BITSANDBYTES_CODEBOOKS if owner == "bitsandbytes" else (*CODEBOOKS, "custom")
    if owner not in ("bitsandbytes", "nf4kernels") or codebook not in names or quant_type != codebook:
        raise ValueError(f"{who}: quant_type in {name} must be a known codebook and match the key, got {quant_type!r}")
    if not isinstance(block_size, int):
        raise ValueError(f"{who}: blocksize in {name} must be an integer, got {block_size!r}")
    check_block_size(block_size, f"{who}: {name}")
    if "nested_offset" in metadata:
        offset, group = metadata["nested_offset"], metadata.get("nested_blocksize")
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise ValueError(f"{who}: nested_offset in {name} must be finite, got {offset!r}")
        if group != SUPERBLOCK or metadata.get("nested_dtype") != "float32":
            cause = f", {REPACKED}" if metadata.get("nested_dtype") == "bfloat16" else ""
            raise ValueError(
                f"{who}: nested_blocksize and nested_dtype in {name} must be {SUPERBLOCK} and float32,"
                f" got {group!r} and {metadata.get('nested_dtype')!r}{cause}"
            )
    elif "scale_codebook" in metadata:
        own = FORMATS[codebook].scale_codebook if codebook in FORMATS else None
        if own is None or metadata["scale_codebook"] != own:
            came = metadata["scale_codebook"]
            raise ValueError(f"{who}: scale_codebook in {name} must be {own} of {codebook}, got {came!r}")
    return {**metadata, "dtype": dtype}


def _read_code(stored: Tensor, codebook: str, name: str, who: str) -> Tensor:
    """fp32 `[16]`, or int8's `[256]`: the named codebook, or the stored levels of a custom one.

    bitsandbytes decodes by the name and never reads the map, so a map that disagrees would decode to other weights
    there than here: it is refused.
    """
    if stored.numel() != levels_of(codebook) or not stored.is_floating_point():
        raise ValueError(
            f"{who}: {name} must hold {levels_of(codebook)} levels, got {stored.dtype} {list(stored.shape)}"
        )
    levels = stored.reshape(-1).float()
    if codebook == "custom":
        return levels
    if not torch.allclose(levels.cpu(), CODEBOOKS[codebook], rtol=0, atol=1e-6):
        raise ValueError(f"{who}: {name} must be the {codebook} codebook, got {levels.tolist()}")
    return CODEBOOKS[codebook].to(stored.device, copy=True)


def _shaped(tensor: Tensor, shape: tuple[int, ...], name: str, who: str) -> Tensor:
    if tensor.numel() != math.prod(shape):
        raise ValueError(f"{who}: {name} must have {math.prod(shape)} elements, got {tensor.numel()}")
    return tensor.contiguous().reshape(shape)
