"""The loss on answers, and the loops that lower and measure it."""

import resource
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .data import IGNORED, Batch

WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls along a cosine


def answer_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """(sum over answer tokens of -log p, how many there are), in fp32.

    The output layer runs only from the first to the last column that holds an answer in any row: with 49152 words it is
    a quarter of a small model's work.
    """
    columns = (batch.targets != IGNORED).any(0).nonzero().flatten()
    keep = torch.arange(int(columns[0]), int(columns[-1]) + 1)
    mask = None if batch.mask.all() else batch.mask
    logits = model(input_ids=batch.ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
    targets = batch.targets[:, keep].flatten()
    answers = targets != IGNORED
    loss = cross_entropy(logits.flatten(0, 1)[answers].float(), targets[answers], reduction="sum")
    return loss, int(answers.sum())


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch], title: str) -> float:
    """Mean of -log p over all answer tokens of all batches."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in tqdm(batches, desc=f"  {title}", unit="batch", leave=False, disable=None):
        loss, answers = answer_loss(model, batch)
        total, count = total + loss.item(), count + answers
    model.train(training)
    return total / count


def train(
    model: nn.Module, batches: list[Batch], learning_rate: float, title: str, weight_decay: float = 0.0
) -> tuple[list[float], float]:
    """One AdamW step a batch on the parameters that require a gradient; (loss of every step, tokens a second)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
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
    losses, tokens, begin = [], 0, time.perf_counter()
    # into a log file a line every ten seconds, on a terminal at once
    with tqdm(batches, desc=f"  {title}", unit="step", mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for batch in bar:
            loss, answers = answer_loss(model, batch)
            loss = loss / answers
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            tokens += batch.tokens
            rate = tokens / (time.perf_counter() - begin)
            memory = resident_bytes() / 2**20
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {rate:.0f} tokens/s, memory {memory:.0f} MiB", refresh=False)
    model.eval()
    return losses, tokens / (time.perf_counter() - begin)


def resident_bytes() -> int:
    """Memory that this process holds now."""
    try:
        with open("/proc/self/statm", encoding="utf-8") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def peak_bytes() -> int:
    """The most memory that this process ever held, of Linux's ru_maxrss."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
