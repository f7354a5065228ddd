"""What a batch is, for any model: how it is run, which rows of its logits count, and what they are to predict."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
IGNORED = -100  # the label of a position that has none, as torch's cross_entropy has it
LABELS = "labels"


def run(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """What the model returns for a batch: a mapping is its keyword arguments, a sequence its arguments.

    `labels` of a mapping are not given to it: a loss that the model computes itself is no use here.
    """
    if isinstance(batch, Tensor):
        return model(batch, **options)
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != LABELS}, **options)
    return model(*batch, **options)


def logits_in(output: Any) -> Tensor:
    """`[..., classes]`: the output itself, its attribute or key `logits`, or its first element."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output[0]


def is_causal(logits: Tensor, batch: Batch) -> bool:
    """Whether position t of the logits predicts token t + 1: `[B, T, vocabulary]` of token ids `[B, T]`."""
    ids = token_ids(batch)
    return logits.dim() == 3 and ids is not None and ids.shape == logits.shape[:2]


def token_ids(batch: Batch) -> Tensor | None:
    """The integer tensor `[B, T]` that the model reads, where there is one."""
    first = batch.get("input_ids") if isinstance(batch, Mapping) else batch if isinstance(batch, Tensor) else batch[0]
    return first if isinstance(first, Tensor) and first.dim() == 2 and not first.is_floating_point() else None


def counted(logits: Tensor, batch: Batch) -> Tensor | None:
    """bool `[B, T]` of logits `[B, T, ...]`: the positions that count; None is all rows.

    Of a causal model those before the last whose next token is one of the text: where `attention_mask` is there, it
    and the next one's are 1.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not is_causal(logits, batch):
        return mask.bool() if mask is not None and mask.shape == logits.shape[:2] and logits.dim() == 3 else None
    kept = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    kept[:, :-1] = True if mask is None else (mask[:, :-1] * mask[:, 1:]).bool()
    return kept


def counted_rows(logits: Tensor, batch: Batch) -> Tensor:
    """`[rows, classes]`: the logits that count, in order."""
    kept = counted(logits, batch)
    return logits.reshape(-1, logits.shape[-1]) if kept is None else logits[kept]


def targets(logits: Tensor, batch: Batch) -> Tensor | None:
    """int64 `[rows]`, what the counted rows are to predict, IGNORED where nothing; None without labels.

    `labels` of a mapping; of a causal model without them its next tokens.
    """
    labels = batch.get(LABELS) if isinstance(batch, Mapping) else None
    if not is_causal(logits, batch):
        if labels is None:
            return None
        kept = counted(logits, batch)
        return labels.reshape(-1) if kept is None else labels[kept]
    following = (token_ids(batch) if labels is None else labels).roll(-1, 1)  # type: ignore[union-attr]  # is causal
    return following[counted(logits, batch)]


def cross_entropy(model: nn.Module, batch: Batch, who: str) -> Tensor:
    """The mean cross-entropy of what the batch is to predict, in fp32; ValueError where that is nothing."""
    logits = logits_in(run(model, batch))
    wanted = targets(logits, batch)
    if wanted is None or not (wanted != IGNORED).any():
        raise ValueError(f"{who}: batches must have labels or next tokens, got none")
    return functional.cross_entropy(counted_rows(logits, batch).float(), wanted, ignore_index=IGNORED)
