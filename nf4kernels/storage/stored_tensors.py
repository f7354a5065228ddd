"""The tensors of a model's directory, read one by one."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import checkpoint_files


class StoredTensors(Mapping[str, Tensor]):
    """name -> tensor of a safetensors file, or of a directory with one or an index; each is read when it is asked for.

    Raises:
        ValueError: a file is damaged. OSError: there is none.
    """

    def __init__(self, path: str | Path, who: str) -> None:
        self._who = who
        self._files: dict[str, Path] = {}
        for file in checkpoint_files(Path(path), who):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as error:
                raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
