"""A text's tokens in batches, and a causal language model's loss on them."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..recover.heads import CHUNK
from .errors import StageError

BATCH_TOKENS = 1024
LONGEST_TOKEN = 64  # characters: so many times the tokens wanted, and no more of a text is tokenized


def read_documents(path: Path, most: int, flag: str = "--text") -> Iterator[str]:
    """The documents of a text file: all of a .txt, or the `text` of each line of a .jsonl; about `most` characters.

    flag: what an error calls the path.

    Raises:
        StageError: the file is missing, empty or not UTF-8, or a line is not an object with `text` (its number is
            named).
    """
    lines = path.suffix in (".jsonl", ".json")
    try:
        with path.open(encoding="utf-8-sig") as file:
            if not lines:
                text = file.read(most)
                if not text.strip():
                    raise StageError(f"{path} must hold text, got an empty file")
                yield text
                return
            read = 0
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                yield _text_of(line, f"{path} line {number}")
                read += len(line)
                if read >= most:
                    return
            if not read:
                raise StageError(f"{path} must hold text, got an empty file")
    except UnicodeDecodeError as error:
        raise StageError(f"{path} must be UTF-8, got {error}") from None
    except OSError as error:
        raise StageError(f"{flag} must be a file that can be read, got {error}") from None


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise StageError(f"{where}: must hold JSON, got {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        came = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise StageError(f'{where}: must be an object with a string "text", got {came}')
    return text


def windows(documents: Iterable[str], tokenizer: Any, length: int, tokens: int) -> list[list[int]]:
    """Token ids, cut into windows of at most `length`, until `tokens` of them are to be predicted.

    A document begins with what the tokenizer begins a text with. The first token of each window is context alone, so
    that a window of n tokens has n - 1 to predict; windows of one token are left out. Too few tokens are all of them.
    """
    found: list[list[int]] = []
    left = tokens
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        for start in range(0, len(ids), length):
            window = ids[start : start + length][: left + 1]
            if len(window) >= 2:
                found.append(window)
                left -= len(window) - 1
            if left <= 0:
                return found
    return found


def windows_of(file: Path, tokenizer: Any, length: int, tokens: int, flag: str = "--text") -> list[list[int]]:
    """`windows` of a text file.

    Raises:
        StageError: as `read_documents`, or there is no window.
    """
    found = windows(read_documents(file, tokens * LONGEST_TOKEN, flag), tokenizer, length, tokens)
    if not found:
        raise StageError(f"{file} must hold at least two tokens, got fewer")
    return found


@dataclass(frozen=True)
class Batch:
    """ids, mask: `[B, T]`, padded on the right; `mask` is 1 on tokens of the text.

    predicts: bool `[B, T-1]`, the positions whose next token is to be predicted.
    """

    ids: Tensor
    mask: Tensor
    predicts: Tensor


def batches_of(
    rows: Sequence[list[int]], device: torch.device, has_loss: Sequence[Sequence[bool]] | None = None
) -> list[Batch]:
    """Every window once, those of similar length together, at most BATCH_TOKENS a batch or one window.

    `has_loss` says of each token whether it is to be predicted; None is all of them.
    """
    groups: list[list[tuple[list[int], Sequence[bool]]]] = []
    pairs = zip(rows, [[True] * len(row) for row in rows] if has_loss is None else has_loss)
    for pair in sorted(pairs, key=lambda pair: len(pair[0])):
        if not groups or (len(groups[-1]) + 1) * len(pair[0]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(pair)
    return [_collated(group, device) for group in groups]


def _collated(rows: list[tuple[list[int], Sequence[bool]]], device: torch.device) -> Batch:
    width = max(len(row) for row, _ in rows)
    ids, mask, predicts = torch.zeros(3, len(rows), width, dtype=torch.long)
    for i, (row, has_loss) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        predicts[i, : len(row)] = torch.tensor(has_loss)
    return Batch(ids.to(device), mask.to(device), predicts[:, 1:].bool().to(device))


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Nats a token to predict, over all batches together; NaN where there is none."""
    tokens = sum(int(batch.predicts.sum()) for batch in batches)
    total = sum(summed_losses(logits_of(model, batch), targets_of(batch)) for batch in batches)
    return total / tokens if tokens else math.nan


def logits_of(model: Any, batch: Batch) -> Tensor:
    """`[tokens to predict, vocabulary]`."""
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    return logits[:, :-1][batch.predicts]


def targets_of(batch: Batch) -> Tensor:
    return batch.ids[:, 1:][batch.predicts]


def summed_losses(logits: Tensor, targets: Tensor) -> float:
    """The sum of -log p(target) over tokens: log-softmax in fp32, sums in fp64."""
    total = 0.0
    for part, target in zip(logits.split(CHUNK), targets.split(CHUNK)):
        chosen = part.float().log_softmax(-1).gather(1, target[:, None])
        total -= chosen.double().sum().item()
    return total
