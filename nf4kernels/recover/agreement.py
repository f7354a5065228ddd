"""How far a model is from another one on a text: loss, KL divergence, top-1 agreement."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from .batches import IGNORED, Batch, counted_rows, logits_in, run, targets
from .heads import CHUNK
from .losses import soft_labels, teacher_log_probs


@dataclass(frozen=True)
class Agreement:
    """Of a model on batches.

    Attributes:
        rows: predictions, as tokens of a text.
        loss: cross-entropy with what is to be predicted, nats a row; NaN where batches have no labels.
        kl: KL(reference || model), nats a row.
        top1: the share of rows whose likeliest class is the reference's.
    """

    rows: int
    loss: float
    kl: float
    top1: float


@torch.no_grad()
def agreement(model: nn.Module, reference: nn.Module, batches: Iterable[Batch], progress: bool = False) -> Agreement:
    """How `model` differs from `reference` on `batches`; both are evaluated and left in the modes that they had.

    Each row's numbers are in fp32, their sums in fp64. A model against itself has the loss of that model.

    Raises:
        ValueError: the two do not predict the same classes, or no row of the batches counts.
    """
    rows = labelled = hits = 0
    loss = kl = 0.0
    with evaluating(model), evaluating(reference):
        for batch in tqdm(batches, desc="agreement", unit="batch", disable=not progress):
            whole = logits_in(run(model, batch))
            ours, expected = counted_rows(whole, batch), targets(whole, batch)
            theirs = ours if model is reference else counted_rows(logits_in(run(reference, batch)), batch)
            if ours.shape != theirs.shape:
                raise ValueError(
                    "nf4kernels.recover.agreement: reference must predict the model's classes, got logits "
                    f"{list(theirs.shape)} beside {list(ours.shape)}"
                )
            rows += len(ours)
            hits += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            kl += summed_divergence(theirs, ours)
            if expected is not None:
                labelled += int((expected != IGNORED).sum())
                loss += sum(
                    _summed(functional.cross_entropy(part.float(), wanted, ignore_index=IGNORED, reduction="none"))
                    for part, wanted in zip(ours.split(CHUNK), expected.split(CHUNK))
                )
    if not rows:
        raise ValueError("nf4kernels.recover.agreement: batches must have rows that count, got none")
    return Agreement(rows, loss / labelled if labelled else math.nan, kl / rows, hits / rows)


@torch.no_grad()
def summed_divergence(reference: Tensor, logits: Tensor) -> float:
    """The sum over rows of KL(reference || logits), of logits `[rows, classes]`: each row in fp32, the sum in fp64."""
    return sum(
        _summed(soft_labels(ours, teacher_log_probs(theirs)))
        for theirs, ours in zip(reference.split(CHUNK), logits.split(CHUNK))
    )


def _summed(values: Tensor) -> float:
    return values.double().sum().item()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """A `with` in which a model is in evaluation mode; each module has its own mode back after it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode
