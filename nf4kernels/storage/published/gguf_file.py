"""A GGUF file: its metadata, and its tensors in bytes, mapped and not read.

Source: ggml's specification of the format, versions 2 and 3, little-endian.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ggml_blocks import NAMES, SIZES

MAGIC = b"GGUF"
# Of a value's type: struct's letter. 8 is a string, 9 an array.
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """What the table of a file says of a tensor; `shape` is torch's, its last dimension the fastest."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int  # in the file, in bytes

    @property
    def row_bytes(self) -> int:
        size, width = SIZES[self.kind]
        return self.shape[-1] // size * width


class GgufFile:
    """A file's `metadata` (arrays of strings are left out) and `tensors`, by name.

    Raises:
        ValueError: the file is no GGUF, is cut, or holds a tensor whose rows are no whole blocks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read_header(size)
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path} must be a whole GGUF file, got {error}") from None

    def rows(self, name: str) -> Tensor:
        """uint8 `[..., bytes of a row]`, a view of the file."""
        tensor = self.tensors[name]
        shape = (*tensor.shape[:-1], tensor.row_bytes)
        return self._bytes[tensor.offset : tensor.offset + math.prod(shape)].view(shape)

    def _read_header(self, size: int) -> None:
        if bytes(self._bytes[:4].tolist()) != MAGIC:
            raise ValueError(f"{self.path} must be a GGUF file, got one that does not begin with {MAGIC.decode()}")
        self._at = 4
        version, tensors, entries = self._take("IQQ")
        if version not in (2, 3):
            raise ValueError(f"{self.path} must be GGUF of version 2 or 3, got {version}")
        for _ in range(entries):
            key = self._string()
            value = self._value(*self._take("I"))
            if value is not None:
                self.metadata[key] = value
        table = []
        for _ in range(tensors):
            name = self._string()
            (dims,) = self._take("I")
            shape = self._take(f"{dims}Q")[::-1]
            table.append((name, shape, *self._take("IQ")))
        step = self.metadata.get("general.alignment", 32)
        if not isinstance(step, int) or step < 1:
            raise struct.error(f"an alignment of {step!r}")
        begin = -(-self._at // step) * step
        for name, shape, number, offset in table:
            kind = NAMES.get(number, f"type {number}")
            self.tensors[name] = GgufTensor(name, shape or (1,), kind, begin + offset)
            self._check(self.tensors[name], size)

    def _check(self, tensor: GgufTensor, size: int) -> None:
        if tensor.kind not in SIZES:
            return  # not read, or refused by whoever wants it
        weights = SIZES[tensor.kind][0]
        if tensor.shape[-1] % weights:
            raise ValueError(
                f"{self.path}: {tensor.name} must have rows of whole blocks of {weights}, got {tensor.shape}"
            )
        end = tensor.offset + math.prod(tensor.shape[:-1]) * tensor.row_bytes
        if end > size:
            raise ValueError(f"{self.path} must be a whole GGUF file, got one that ends inside of {tensor.name}")

    def _take(self, letters: str) -> tuple[Any, ...]:
        layout = f"<{letters}"
        count = struct.calcsize(layout)
        values = struct.unpack(layout, bytes(self._bytes[self._at : self._at + count].tolist()))
        self._at += count
        return values

    def _string(self) -> str:
        (length,) = self._take("Q")
        text = bytes(self._bytes[self._at : self._at + length].tolist())
        if len(text) != length:
            raise struct.error("the end of the file inside of a name")
        self._at += length
        return text.decode()

    def _value(self, kind: int) -> Any:
        """A value of the metadata; None for an array of strings, which is a vocabulary."""
        if kind in FIXED:
            return self._take(FIXED[kind])[0]
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise struct.error(f"a value of type {kind}")
        inner, count = self._take("IQ")
        if inner in FIXED:
            return list(self._take(f"{count}{FIXED[inner]}"))
        for _ in range(count):
            if inner == STRING:
                (length,) = self._take("Q")
                self._at += length
            else:
                self._value(inner)
        return None
