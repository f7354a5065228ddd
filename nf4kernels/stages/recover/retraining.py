"""A short training towards the model as it was, of adapters that are merged under masks, and the text for it."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ...nn.lora import LoraConfig
from ...recover.batches import counted_rows
from ...recover.pruning.retraining import MaskedLora
from ..errors import StageError
from ..text_loss import LONGEST_TOKEN, read_documents, windows

WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls along a cosine


@dataclass(frozen=True)
class Windows:
    """tokens: of a text for scores, and of a held-out one; length: of a window; batch: windows at a time."""

    tokens: int
    length: int
    batch: int


@dataclass(frozen=True)
class Training:
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
        self._windows = _read(text, tokenizer, how.length, wanted) if text else []
        scored = self._windows[: -(-how.tokens // (how.length - 1))]
        self.scored = self._batches(scored, how.batch)
        held = _read(held_out, tokenizer, how.length, how.tokens) if held_out else []
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


def _read(file: str, tokenizer: Any, length: int, tokens: int) -> list[list[int]]:
    found = windows(read_documents(Path(file), tokens * LONGEST_TOKEN), tokenizer, length, tokens)
    if not found:
        raise StageError(f"{file} must hold at least two tokens, got fewer")
    return found


def retrain(
    model: Any, teacher: Any, masks: Mapping[str, Tensor | None], how: Training, batches: Iterable[dict], bar: tqdm
) -> None:
    """Train KL(teacher || model) on the batches, by adapters that are merged under the masks.

    Raises:
        StageError: it is not finite; the model is then as it was.
    """
    adapters = MaskedLora(model, masks, LoraConfig(r=how.rank))
    optimizer = torch.optim.AdamW(adapters.parameters(), how.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * how.steps), how.steps)
    for batch in batches:
        with torch.no_grad():
            wanted = counted_rows(teacher(**batch).logits, batch).float().log_softmax(-1)
        found = counted_rows(model(**batch).logits, batch).float().log_softmax(-1)
        loss = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        if not loss.isfinite():
            adapters.remove()
            raise StageError(f"--learning_rate must leave the loss finite, got {how.learning_rate} and {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(KL=f"{loss.item():.3f}")
        bar.update()
    adapters.merge()
