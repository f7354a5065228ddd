"""What is in a checkpoint's files, by their headers, of which a process reads the part that it wants."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .key_conversion import Group

Part = tuple[slice, ...]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    file: Path
    name: str


@contextmanager
def views(stored: Sequence[Stored], who: str) -> Iterator[list[Tensor]]:
    """The tensors, mapped into memory: of their bytes those are read that are looked at, and let go at the end."""
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        try:
            for file in dict.fromkeys(each.file for each in stored):
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            tensors = [opened[each.file].get_tensor(each.name) for each in stored]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{who}: the files must stay as they were, got {error}") from None
        yield tensors


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor of the model in files: one there, or what transformers' rules make of several."""

    group: Group
    target: str
    stored: list[Stored]
    on_meta: Tensor

    def read(self, model: nn.Module, part: Part, who: str) -> Tensor:
        """A copy of that part; where it is some experts of all, the others' tensors are not looked at."""
        group, stored = self.group, self.stored
        E, own = self.on_meta.shape[0] if self.on_meta.dim() == 3 else 0, part[0] if part else slice(0)
        count = own.stop - own.start if E else 0
        if group.converter is not None and 0 < count < E and len(stored) % E == 0:
            made = self._made_of_some(model, own, who)
            if made is not None:
                inner: Part = (slice(0, count), *part[1:])
                return made[inner].contiguous()
        with views(stored, who) as tensors:
            return group.convert(model, tensors)[self.target][part].clone(memory_format=torch.contiguous_format)

    def _made_of_some(self, model: nn.Module, experts: slice, who: str) -> Tensor | None:
        """By the rules, of these experts' tensors alone; None where the rules do not go expert by expert."""
        by_pattern: dict[str, list[int]] = {}
        for index, pattern in enumerate(self.group.sources.values()):
            by_pattern.setdefault(pattern, []).append(index)
        if any(len(indices) != self.on_meta.shape[0] for indices in by_pattern.values()):
            return None
        names = list(self.group.sources)
        chosen = [index for indices in by_pattern.values() for index in indices[experts]]
        group = Group({names[i]: self.group.sources[names[i]] for i in chosen}, self.group.target, self.group.converter)
        with views([self.stored[i] for i in chosen], who) as tensors:
            try:
                made = group.convert(model, tensors)[self.target].clone()
            except Exception:  # what transformers' operations raise has no common type
                return None
        return made if made.shape == (experts.stop - experts.start, *self.on_meta.shape[1:]) else None
