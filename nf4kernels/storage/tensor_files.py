"""Tensors in safetensors files, by name, read one at a time."""

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class TensorFiles:
    """What safetensors files hold by their headers; files of other kinds are left out.

    Raises:
        ValueError: a file is missing or damaged; `who` names the caller.
    """

    def __init__(self, files: Iterable[str | Path], who: str) -> None:
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        for file in files:
            if not str(file).endswith(".safetensors"):
                continue
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
                self._file_of.update(dict.fromkeys(opened.keys(), opened))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}") from None

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    @property
    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def read(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def on_meta(self, name: str) -> Tensor:
        """Its shape and dtype."""
        stored = self._file_of[name].get_slice(name)
        shape = stored.get_shape()
        return torch.empty(shape, dtype=(stored[:0] if shape else self.read(name)).dtype, device="meta")
