"""Tensors that `torch.save` wrote, in adapter_model.bin or pytorch_model.bin: of the pickle tensors alone are read."""

import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from .tensor_files import indexed_files

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def read_bin(file: Path, who: str, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors by their names; with `mmap` each is read from disk when its values are used,
    unless the file is of a torch before 1.6.

    Raises:
        ValueError: the file is damaged or holds anything else; no code in it was run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a pickle that is none of its own
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle raises has no common type
        raise ValueError(f"{who}: {file} must hold tensors alone, got {_cause(error)}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{who}: {file} must hold tensors by name, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        came = _problem(name, tensor)
        if came is not None:
            raise ValueError(f"{who}: {file} must hold tensors by name alone, got {came}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _cause(error: Exception) -> str:
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found is not None:
        return found[1]
    if "Weights only load failed" in text or not text:
        return "a damaged file or another kind of one"
    return f"a damaged file ({text.splitlines()[0].partition('. ')[0]})"


def _problem(name: Any, tensor: Any) -> str | None:
    if not isinstance(name, str):
        return f"the name {name!r}"
    if not isinstance(tensor, Tensor):
        return f"{name} of type {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)
        return f"{name}, a {kind.removeprefix('torch.')} tensor"
    return None


def bin_files(directory: Path, who: str) -> list[Path]:
    """A model's files; ValueError where their index is damaged or names a file that is missing."""
    index = directory / BIN_INDEX
    return indexed_files(index, who) if index.is_file() else [directory / BIN]


class BinFiles:
    """What such files hold, as `TensorFiles` has it of safetensors.

    Raises:
        ValueError: a file is damaged or holds anything but tensors; `who` names the caller.
    """

    def __init__(self, files: Iterable[Path], who: str) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            self._tensors.update(read_bin(file, who, mmap=True))

    def __enter__(self) -> "BinFiles":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tensors.clear()

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def on_meta(self, name: str) -> Tensor:
        """Its shape and dtype."""
        return self._tensors[name].to("meta")
