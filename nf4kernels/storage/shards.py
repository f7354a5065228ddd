"""Output files of a size: which tensors go together, and writing them one file after the other."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from .atomic import write_json
from .tensor_files import INDEX, write_tensors

Source = tuple[str, Tensor, Callable[[str], Tensor]]  # a tensor's name, its shape on meta, and what reads it
Item = TypeVar("Item")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """The bytes of "5GB", "500MB" or "2GiB", as transformers' max_shard_size takes them; ValueError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    factor = UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * factor) if match and factor else 0
    if size < 1:
        raise ValueError(f"must be a size such as 5GB, 500MB or 2GiB, got {text!r}")
    return size


def write_shards(sources: Iterable[Source], directory: Path, size: int, progress: bool, what: str) -> int:
    """model.safetensors, or files of at most `size` bytes (or one tensor) and their index; how many bytes in all.

    Each tensor is read when its file is being filled, so that beside that file one tensor is in memory.
    """
    sources = list(sources)
    shards = in_files(sources, [source[1].nbytes for source in sources], size)
    total = sum(source[1].nbytes for source in sources)
    weight_map: dict[str, str] = {}
    with tqdm(total=len(sources), desc=what, unit="tensor", disable=not progress) as bar:
        for number, shard in enumerate(shards, 1):
            file = file_name(number, len(shards))
            write_tensors(dict(_read_all(shard, bar)), directory / file)
            weight_map.update({name: file for name, *_ in shard})
    if len(shards) > 1:
        write_index(directory, weight_map, total)
    return total


def in_files(items: Sequence[Item], sizes: Sequence[int], most: int) -> list[list[Item]]:
    """Which of them go into one file, in order: at most `most` bytes, or one item."""
    files: list[list[Item]] = [[]]
    filled = 0
    for item, size in zip(items, sizes):
        if filled and filled + size > most:
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += size
    return files


def file_name(number: int, files: int) -> str:
    """Of the file of that number, from 1 on."""
    return "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"


def is_file_name(name: str) -> bool:
    """Whether a file of that name is a part of a checkpoint."""
    return name == INDEX or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name) is not None


def write_index(directory: Path, weight_map: dict[str, str], total: int) -> None:
    """`weight_map`: name of a tensor -> its file; `total` bytes of all."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, index)


def _read_all(shard: Iterable[Source], bar: Any) -> Iterator[tuple[str, Tensor]]:
    for name, _, read in shard:
        yield name, read(name)
        bar.update()
