"""A short training towards the model as it was, of adapters that are merged under masks, and the text for it."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...nn.lora import LoraConfig
from ...recover.distill import Training, distill
from ...recover.pruning.retraining import MaskedLora
from ..errors import StageError
from ..text_loss import windows_of

WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls along a cosine


@dataclass(frozen=True)
class Windows:
    """tokens: of a text for scores, and of a held-out one; length: of a window; batch: windows at a time."""

    tokens: int
    length: int
    batch: int


@dataclass(frozen=True)
class Retraining:
    """steps of an optimizer; rank: of the adapters."""

    steps: int
    learning_rate: float
    rank: int


class Texts:
    """Batches for the scores, `scored`, and of the held-out text, `held_out`, and windows for `trained` steps.

    Raises:
        StageError: a file cannot be read or holds too little.
    """

    def __init__(
        self, text: str | None, held_out: str | None, how: Windows, trained: int, tokenizer: Any, device: torch.device
    ) -> None:
        self._device = device
        wanted = max(how.tokens, trained * how.batch * how.length)
        self._windows = windows_of(Path(text), tokenizer, how.length, wanted) if text else []
        scored = self._windows[: -(-how.tokens // (how.length - 1))]
        self.scored = self._batches(scored, how.batch)
        held = windows_of(Path(held_out), tokenizer, how.length, how.tokens, "--held_out") if held_out else []
        self.held_out = self._batches(held, how.batch)

    def drawn(self, count: int, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches of windows: each of them once before any comes again."""
        order = random.Random(seed)
        waiting: list[list[int]] = []
        for _ in range(count):
            while len(waiting) < batch:
                waiting += order.sample(self._windows, len(self._windows))
            yield self._collated([waiting.pop() for _ in range(batch)])

    def _batches(self, rows: list[list[int]], size: int) -> list[dict[str, Tensor]]:
        ordered = sorted(rows, key=len)
        return [self._collated(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    def _collated(self, rows: list[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}


def retrain(
    model: Any, teacher: Any, masks: Mapping[str, Tensor | None], how: Retraining, batches: Sequence[Any], bar: tqdm
) -> None:
    """Train KL(teacher || model) on the batches, by adapters that are merged under the masks.

    Raises:
        StageError: it is not finite; the model is then as it was.
    """

    def told(step: int, losses: dict[str, float]) -> None:
        bar.set_postfix(KL=f"{losses['loss']:.3f}")
        bar.update()

    adapters = MaskedLora(model, masks, LoraConfig(r=how.rank))
    training = Training(how.steps, how.learning_rate, WARMUP, shuffle=False)
    try:
        distill(model, teacher, batches, training, callback=told)
    except BaseException as error:
        adapters.remove()
        if not isinstance(error, ValueError):
            raise
        raise StageError(f"--learning_rate must leave the loss finite, got {how.learning_rate}: {error}") from error
    adapters.merge()
