"""Tensors in safetensors files, by name, read one at a time or written as one, and which files a checkpoint is."""

import json
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import replacing

INDEX = "model.safetensors.index.json"


def checkpoint_files(path: Path, who: str) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, or those of a Hugging Face directory."""
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if index.exists():
        return indexed_files(index, who)
    if not (path / "model.safetensors").exists():
        hint = " (nf4kernels convert makes them of .bin files)" if any(path.glob("pytorch_model*.bin")) else ""
        raise ValueError(f"{who}: path must have model.safetensors or its index{hint}, got {path}")
    return [path / "model.safetensors"]


def indexed_files(index: Path, who: str) -> list[Path]:
    """The files that an index names; ValueError where it is damaged or one of them is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{who}: {index} must hold a weight_map in JSON, got {error!r}") from None
    missing = [name for name in names if not isinstance(name, str) or not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{who}: {index} must name files that exist, got {missing[0]}")
    return [index.parent / name for name in names]


def check_index(index: Path, names: Collection[str], who: str) -> None:
    """ValueError where there is an index that lists other tensors than its files hold."""
    if not index.exists():
        return
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for name in sorted(listed.keys() ^ set(names)):
        raise ValueError(f"{who}: {index.name} must list the tensors of its files, {name} is in one of the two only")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, complete or absent; tensors are moved to the CPU, and copied where they share memory."""
    seen, owned = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with replacing(path) as partial:
        save_file(owned, partial, {"format": "pt", **(metadata or {})})


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
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def read(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def peek(self, name: str) -> Tensor:
        """As `read`: `PublishedFiles` would have to read more for it."""
        return self.read(name)

    def on_meta(self, name: str) -> Tensor:
        """Its shape and dtype."""
        stored = self._file_of[name].get_slice(name)
        shape = stored.get_shape()
        return torch.empty(shape, dtype=(stored[:0] if shape else self.read(name)).dtype, device="meta")
