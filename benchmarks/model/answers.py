"""The demo's word definitions in batches, and a plain loop that trains on their answers, for the tables of this folder.

The rows of a table differ in their weights or their merge alone: none has a trainer's own casts in between.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from nf4kernels.demo.data import HELD_OUT, definitions
from nf4kernels.stages.text_loss import Batch, batches_of

CPU = torch.device("cpu")
WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls along a cosine
Rows = list[dict[str, str]]
Encoded = tuple[list[int], list[bool]]


def train_and_held_out() -> tuple[Rows, Rows]:
    """The definitions, of which the last HELD_OUT are held out."""
    rows = definitions()
    return rows[:-HELD_OUT], rows[-HELD_OUT:]


def encode(row: dict[str, str], tokenizer: Any, max_length: int) -> Encoded:
    """(token ids of prompt + completion + end of text, which of them are to be predicted), cut at `max_length`."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = (prompt + answer)[:max_length]
    return ids, [place >= len(prompt) for place in range(len(ids))]


def batched(rows: Iterable[Encoded]) -> list[Batch]:
    """Every row once, those of similar length together."""
    ids, has_loss = zip(*rows)
    return batches_of(ids, CPU, has_loss)


def training_batches(rows: Sequence[Encoded], batch: int, steps: int, seed: int) -> list[Batch]:
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
            cut = [batched(rows[i] for i in group[at : at + batch]) for at in range(0, len(group), batch)]
            draw.shuffle(cut)
            batches += [one for (one,) in cut]
            if len(batches) >= steps:
                break
    return batches[:steps]


def train(model: nn.Module, batches: Sequence[Batch], learning_rate: float, title: str) -> None:
    """One AdamW step a batch on the parameters that require a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    warmup = max(1, round(WARMUP * len(batches)))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, len(batches) - warmup)),
        ],
        milestones=[warmup],
    )
    model.train()
    with tqdm(batches, desc=f"  {title}", unit="step") as bar:
        for batch in bar:
            mask = None if batch.mask.all() else batch.mask
            logits = model(input_ids=batch.ids, attention_mask=mask, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1][batch.predicts].float(), batch.ids[:, 1:][batch.predicts])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.eval()
