"""Prompt and answer pairs: read from a file, checked, turned into tokens, grouped into batches."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WORDNET = Path(__file__).parent / "wordnet.jsonl"
HELD_OUT = 128  # examples that every evaluation uses, at most
EVALUATION_TOKENS = 1024  # in a batch: 300 MB of logits at 49152 words
IGNORED = -100  # target of a position that is not part of an answer


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str
    held_out: bool = False


@dataclass(frozen=True)
class Batch:
    """Right-padded token rows: ids, mask, and targets (the next token where that is answer), each `[rows, length]`."""

    ids: Tensor
    mask: Tensor
    targets: Tensor

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


def parse_line(text: str, where: str) -> Example:
    """One example; ValueError that begins with `where` for anything but the expected JSON object."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object with prompt and answer, got {type(record).__name__}")
    for field in ("prompt", "answer"):
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise ValueError(f"{where}: {field} must be a non-empty string, got {record.get(field)!r}")
    split = record.get("split", "train")
    if split not in ("train", "held-out"):
        raise ValueError(f"{where}: split must be 'train' or 'held-out', got {split!r}")
    return Example(record["prompt"], record["answer"], split == "held-out")


def read_examples(path: Path, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(train, held out) of a `.jsonl` file of {"prompt", "answer"} and, on held-out lines, "split": "held-out".

    Where no line says so, a tenth of the lines is held out, drawn by `seed`.

    Raises:
        ValueError: a line is not such an object (the message names it), or there are fewer than two examples.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also splits inside strings
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {path} must be a readable text file: {error}") from None
    examples = [
        parse_line(line, f"--data {path}, line {number},") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if len(examples) < 2:
        raise ValueError(f"--data {path} must hold at least two examples, got {len(examples)}")
    train = [example for example in examples if not example.held_out]
    held_out = [example for example in examples if example.held_out]
    if not held_out:
        random.Random(seed).shuffle(train)
        count = max(1, len(train) // 10)
        train, held_out = train[count:], train[:count]
    if not train:
        raise ValueError(f"--data {path} must hold at least one example to train on, got held-out ones only")
    return train, held_out[:HELD_OUT]


def encode(example: Example, tokenizer, max_length: int) -> tuple[list[int], int]:
    """(token ids of prompt + answer + end of text, how many of them are prompt), cut at `max_length`.

    A prompt that leaves no room for an answer loses its beginning.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt = tokenizer(example.prompt)["input_ids"]
    prompt = prompt[:-1] if prompt[-1:] == end else prompt  # T5's tokenizers end every text
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"] + end
    prompt = prompt[-(max_length // 2) :] if len(prompt) + len(answer) > max_length else prompt
    return (prompt + answer)[:max_length], len(prompt)


def collate(rows: list[tuple[list[int], int]]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.long)
    for i, (tokens, prompt_length) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        targets[i, prompt_length - 1 : len(tokens) - 1] = ids[i, prompt_length : len(tokens)]
    return Batch(ids, mask, targets)


def training_batches(rows: list[tuple[list[int], int]], batch: int, steps: int, seed: int) -> list[Batch]:
    """`steps` batches, rows drawn without repeat until all were used.

    Sixteen batches at a time are sorted by length before they are cut, so that a batch has little padding, and then
    shuffled, so that lengths come in random order. The last batch before a row comes again may be smaller.
    """
    draw = random.Random(seed)
    batches: list[Batch] = []
    while len(batches) < steps:
        order = draw.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), 16 * batch):
            group = sorted(order[start : start + 16 * batch], key=lambda i: len(rows[i][0]))
            cut = [collate([rows[i] for i in group[at : at + batch]]) for at in range(0, len(group), batch)]
            draw.shuffle(cut)
            batches += cut
            if len(batches) >= steps:
                break
    return batches[:steps]


def evaluation_batches(rows: list[tuple[list[int], int]]) -> list[Batch]:
    """Every row once, rows of similar length together, at most EVALUATION_TOKENS a batch."""
    batches: list[Batch] = []
    group: list[tuple[list[int], int]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if group and (len(group) + 1) * len(row[0]) > EVALUATION_TOKENS:
            batches.append(collate(group))
            group = []
        group.append(row)
    return [*batches, collate(group)]
