"""A published checkpoint as if this package had saved it: its 4-bit weights by our names, all else as it is."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...codebook import CODEBOOKS
from ...nn.checksum import LENGTH
from ...quantized_weight import WEIGHT_DTYPES, QuantizedExperts, QuantizedWeight, scales_of
from ..bitsandbytes_format import stored_weight, stored_weights, weight_to_tensors
from ..experts_format import experts_to_tensors, format_of, stored_experts
from ..key_conversion import Group, group_tensors
from .fused import fused
from .layouts import OURS, Layout, is_of_activations, left_over

CONFIGS = ("config.json", "hf_quant_config.json")  # the second is modelopt's, beside a config.json that is silent


class Files(Protocol):
    """What a checkpoint's files offer; see `TensorFiles`."""

    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str) -> Tensor: ...

    def on_meta(self, name: str) -> Tensor: ...


class PublishedFiles:
    """The tensors of `files` by the names and in the form that `save_checkpoint` gives them.

    Nothing is read but headers and tensors of a few bytes until a weight's first tensor is asked for; then that weight
    is read, or that layer's experts, and its tensors are let go one by one as they are taken.

    Args:
        files: the checkpoint's.
        layout: what `layout_of` says of it.
        model: whose rules rename the file's tensors and stack experts, as in `key_conversion`; it may be on meta.
        dtype: what a dense weight would be.

    Attributes:
        ignored: names of scales of activations, which are left out.

    Raises:
        ValueError: the file has no 4-bit weights, or one is cut, incomplete or of a layout that is not read.
    """

    def __init__(self, files: Files, layout: Layout, model: nn.Module | None, dtype: torch.dtype) -> None:
        self._files = files
        self._weights: dict[str, _Weight] = {}  # our name of a tensor -> the weight it is of
        with torch.device("cpu"):  # a loader may have made meta the device of what is new
            taken = self._find(layout, model, dtype)
        others = [name for name in files.names if name not in taken]
        self.ignored = [name for name in others if is_of_activations(name)]
        self._others = [name for name in others if not is_of_activations(name)]
        stray = left_over(self._others, layout)
        if stray is not None:
            raise ValueError(f"{stray} must be a part of a 4-bit weight, got one without the others")
        if not self._weights:
            raise ValueError(
                f"the checkpoint must have tensors *{layout.markers[0]}, as its configuration says, got none"
            )

    def _find(self, layout: Layout, model: nn.Module | None, dtype: torch.dtype) -> set[str]:
        """Add every weight; the names in the file of what they are made of."""
        names = set(self._files.names)
        parts_of = {}
        for name in names:
            marker = next((each for each in layout.markers if name.endswith(each)), None)
            if marker is not None:
                base = name.removesuffix(marker)
                found = {end: base + end for end in layout.parts if base + end in names}
                parts_of[base + layout.leaf] = found
        state = {} if model is None else model.state_dict(keep_vars=True)
        for group in group_tensors(model, parts_of, {*state, *stored_experts(state)}):
            matrices = [_Matrix(key, self._files, parts_of[key], layout, dtype) for key in group.sources]
            for key, make in _made_of(group, matrices, model).items():
                weight = _Weight(key, make)
                self._weights.update(dict.fromkeys(weight.known, weight))
        return {name for found in parts_of.values() for name in found.values()}

    @property
    def names(self) -> Collection[str]:
        return [*self._weights, *self._others]

    def read(self, name: str) -> Tensor:
        return self._weights[name].read(name) if name in self._weights else self._files.read(name)

    def peek(self, name: str) -> Tensor:
        """Its values where they are known without reading the weight, else its shape and dtype."""
        return self._weights[name].known[name] if name in self._weights else self._files.read(name)

    def on_meta(self, name: str) -> Tensor:
        return self._weights[name].known[name].to("meta") if name in self._weights else self._files.on_meta(name)

    @property
    def experts(self) -> list[str]:
        """The names of the experts' weights."""
        return stored_experts(self._weights)

    @property
    def format(self) -> tuple[str, int | None]:
        """(the codebook of its weights, their block size or None for several)."""
        linear = [stored_weight(parts, self.peek, key, "") for key, parts in stored_weights(self.names).items()]
        found = [(each.codebook, each.block_size) for each in linear] + [self._of_experts(key) for key in self.experts]
        block_sizes = {block_size for _, block_size in found}
        return min(codebook for codebook, _ in found), block_sizes.pop() if len(block_sizes) == 1 else None

    def _of_experts(self, key: str) -> tuple[str, int]:
        """(codebook, block size) of such a weight."""
        known = self._weights[f"{key}.weight"].known
        code, absmax, packed = (known[f"{key}.{leaf}"] for leaf in ("code", "absmax", "weight"))
        block_size = 2 * packed.shape[-1] // absmax.shape[-1]
        return format_of(code, scales_of(absmax, None, known.get(f"{key}.scale_code")), block_size), block_size


class _Matrix:
    """A weight as the file has it."""

    def __init__(self, key: str, files: Files, parts: Mapping[str, str], layout: Layout, dtype: torch.dtype) -> None:
        self.key, self._files, self._parts, self._layout, self._dtype = key, files, parts, layout, dtype
        self._on_meta: Any = None

    def load(self, on_meta: bool = False) -> QuantizedWeight | QuantizedExperts:
        """The weight; on meta all that is decided by values is taken as right, but for what stands in a few bytes."""
        if on_meta:
            self._on_meta = self._on_meta or self._read(on_meta)
            return self._on_meta  # type: ignore[no-any-return]  # set above
        return self._read(on_meta)

    def _read(self, on_meta: bool) -> QuantizedWeight | QuantizedExperts:
        parts = {}
        for ending, name in self._parts.items():
            shape = self._files.on_meta(name)
            parts[ending] = shape if on_meta and shape.dim() > 1 else self._files.read(name)
        try:
            return self._layout.read(parts, self._dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.key}: {error}") from None


class _Weight:
    """One of our weights: what is known of its tensors, and their values when they are asked for."""

    def __init__(self, key: str, make: Any) -> None:
        self.key, self._make = key, make
        self.known = self._tensors(on_meta=True)
        self._loaded: dict[str, Tensor] = {}
        self._lock = Lock()

    def read(self, name: str) -> Tensor:
        if not self.known[name].is_meta:
            return self.known[name]
        with self._lock:
            if name not in self._loaded:
                self._loaded = self._tensors(on_meta=False)
            return self._loaded.pop(name)

    def _tensors(self, on_meta: bool) -> dict[str, Tensor]:
        """By our names; those of a few bytes that the headers tell have values on meta, too."""
        qweight = self._make(on_meta)
        if isinstance(qweight, QuantizedWeight):
            tensors = weight_to_tensors(qweight, self.key)
            known = {f"{self.key}.quant_map": CODEBOOKS[qweight.codebook]}
        else:
            tensors = experts_to_tensors(qweight, self.key)
            source = torch.tensor(WEIGHT_DTYPES.index(qweight.dtype), dtype=torch.uint8)
            known = {
                f"{self.key}.code": CODEBOOKS[qweight.codebook], f"{self.key}.source_dtype": source,
                f"{self.key}.checksum": torch.zeros(LENGTH, dtype=torch.uint8),  # unknown, and taken when loaded
            }  # fmt: skip
        return tensors | {name: value.clone() for name, value in known.items()} if on_meta else tensors


def _made_of(group: Group, matrices: list[_Matrix], model: nn.Module | None) -> dict[str, Any]:
    """Our name of a weight -> what makes it, for each that becomes of the group's matrices.

    Which rows go where is found by converting their numbers in place of the weights.
    """
    if group.converter is None:
        (matrix,) = matrices
        shape = matrix.load(on_meta=True).shape
        return {matrix.key if len(shape) == 2 else group.target: matrix.load}
    heights = [matrix.load(on_meta=True).shape[-2] for matrix in matrices]
    begins = [sum(heights[:number]) for number in range(len(heights))]
    numbers = [torch.arange(begin, begin + height)[:, None] for begin, height in zip(begins, heights)]
    try:
        made = group.convert(model, numbers)
    except Exception as error:  # what transformers' operations raise has no common type
        raise ValueError(f"{group.target} must be made of rows of {matrices[0].key}, got {error}") from None

    def maker(rows: Tensor) -> Any:
        return lambda on_meta: fused(lambda number: matrices[number].load(on_meta), begins, rows)  # type: ignore[arg-type,return-value]

    for name, rows in made.items():
        if rows.dim() not in (2, 3) or rows.shape[-1] != 1 or rows.is_floating_point():
            raise ValueError(f"{name} must be made of whole rows of {matrices[0].key}, got another conversion")
    return {name: maker(rows[..., 0]) for name, rows in made.items()}


def quantization_of(directory: Path) -> dict[str, Any] | None:
    """The quantization_config that a directory's files tell; None where there is none, or it is our own."""
    for name in CONFIGS:
        try:
            content = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(content, dict):
            continue
        fields = content if name == CONFIGS[1] else _anywhere(content, "quantization_config")
        if isinstance(fields, dict) and fields:
            fields = {"quant_method": "modelopt", **fields} if name == CONFIGS[1] else fields
            is_bitsandbytes = fields.get("load_in_4bit") or fields.get("load_in_8bit")
            return None if is_bitsandbytes or fields.get("quant_method") in OURS else fields
    return None


def dtype_of(directory: Path) -> torch.dtype:
    """What config.json says that dense weights are; bfloat16 where it does not."""
    try:
        return dtype_in(json.loads((directory / CONFIGS[0]).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return torch.bfloat16


def dtype_in(config: Mapping[str, Any]) -> torch.dtype:
    """The same of a configuration."""
    word = _anywhere(config, "dtype") or _anywhere(config, "torch_dtype")
    found = getattr(torch, str(word).removeprefix("torch."), None)
    return found if found in WEIGHT_DTYPES else torch.bfloat16


def _anywhere(config: Mapping[str, Any], field: str) -> Any:
    """Of a configuration, or of the text model's inside of it."""
    inner = config.get("text_config")
    return config.get(field) or (inner.get(field) if isinstance(inner, dict) else None)
