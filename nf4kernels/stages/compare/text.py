"""What data types cost a model on a text: loss, KL to the dense model and top-1 agreement, a variant a row."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...model.report import table
from ...recover.agreement import summed_divergence
from ..errors import StageError
from ..text_loss import (
    LONGEST_TOKEN,
    Batch,
    batches_of,
    logits_of,
    read_documents,
    summed_losses,
    targets_of,
    windows,
)
from .dense import DenseWeights, load_dense, open_device
from .variants import Variant


@dataclass(frozen=True)
class Row:
    """What came of one variant.

    Attributes:
        bits: bits a quantized weight, scales and codebooks included.
        rms_error: |Ŵ - W| / |W| over all quantized weights together.
        loss: nats a token on the text.
        kl: KL(dense || variant), nats a token.
        top1: the share of tokens, 0 to 1, for which both models find the same token likeliest.
        seconds: that quantizing and evaluating took.
    """

    variant: Variant
    bits: float
    rms_error: float
    loss: float
    kl: float
    top1: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    tokens: how many tokens were predicted.
    layers, weights: how many were quantized in each variant.
    dense_loss: of the model as it is stored, nats a token.
    rows: in the order of the variants.
    """

    tokens: int
    layers: int
    weights: int
    dense_loss: float
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [vars(row.variant) | {k: v for k, v in vars(row).items() if k != "variant"} for row in self.rows]
        return {name: value for name, value in vars(self).items() if name != "rows"} | {"variants": rows}

    def __str__(self) -> str:
        rows: list[tuple[str, ...] | None] = [
            ("codebook", "block", "scales", "bits/weight", "RMS error", "loss", "over dense", "KL", "top-1")
        ]
        rows.append(("dense", "", "", "", "", f"{self.dense_loss:.4f}", "", "", ""))
        for row in self.rows:
            its = row.variant
            rows.append((
                its.codebook, str(its.block_size), its.scales, f"{row.bits:.3f}", f"{row.rms_error:.4f}",
                f"{row.loss:.4f}", f"{row.loss - self.dense_loss:+.4f}", f"{row.kl:.5f}", f"{100 * row.top1:.2f} %",
            ))  # fmt: skip
        return table(rows, left=(0, 2))


def compare_directory(
    path: str | Path,
    text: str | Path,
    compared: Sequence[Variant],
    tokens: int = 2048,
    length: int = 512,
    skip: Iterable[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """`compare_model` of the dense model in `path` on the first `tokens` tokens of a text file.

    Args:
        path: a Hugging Face directory of a causal language model, not quantized.
        text: a .txt file, one document, or a .jsonl of objects with `text`, a document a line.
        compared: as `variants` makes them.
        tokens: how many to predict, at most. The dense model's logits for all of them are kept.
        length: of a window, in tokens.
        skip: layers to leave dense, as in `nf4kernels.quantize_model`; they add to its own.
        device: None is the GPU where there is one.
        progress: show a progress bar on stderr.

    Raises:
        StageError: an argument, the model or the text is not as it must be.
    """
    path, text = Path(path), Path(text)
    if tokens < 1 or length < 2:
        raise StageError(f"--tokens and --length must be at least 1 and 2, got {tokens} and {length}")
    documents = list(read_documents(text, tokens * LONGEST_TOKEN))
    device = open_device(device)
    model, tokenizer = load_dense(path)
    rows = windows(documents, tokenizer, length, tokens)
    if not rows:
        raise StageError(f"{text} must hold at least two tokens, got fewer")
    return compare_model(model.to(device), batches_of(rows, device), compared, skip, progress=progress)


@torch.no_grad()
def compare_model(
    model: nn.Module,
    batches: Sequence[Batch],
    compared: Sequence[Variant],
    skip: Iterable[str] = (),
    compute_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Comparison:
    """Loss, KL and agreement of each variant, whose weights Ŵ take the places of the dense ones in turn.

    The dense model's logits are computed once and kept, `[tokens, vocabulary]` in `compute_dtype`. The model is left in
    `compute_dtype` with its dense weights.

    Args:
        model: whose call gives `.logits` `[B, T, vocabulary]`, evaluating, in float32, bfloat16 or float16.
        batches: on the model's device.
        compared: as `variants` makes them.
        skip, compute_dtype: as `skip` and `dtype` of DenseWeights.
        progress: show a progress bar on stderr.

    Raises:
        StageError: the model has no layer to quantize, a weight is not finite, or the dense model's loss is not.
    """
    dense = DenseWeights(model, skip, compute_dtype)
    tokens = sum(int(batch.predicts.sum()) for batch in batches)
    references = [logits_of(model, batch) for batch in batches]
    dense_loss = sum(summed_losses(logits, targets_of(batch)) for logits, batch in zip(references, batches)) / tokens
    if not math.isfinite(dense_loss):
        raise StageError(f"MODEL must have a finite loss on the text, got {dense_loss}")
    rows = []
    with dense:
        for variant in tqdm(compared, desc="compare", unit="variant", disable=not progress):
            began = time.perf_counter()
            bits, rms_error = dense.put(variant)
            loss = kl = agree = 0.0
            for batch, reference in zip(batches, references):
                logits = logits_of(model, batch)
                loss += summed_losses(logits, targets_of(batch))
                kl += summed_divergence(reference, logits)
                agree += int((reference.argmax(-1) == logits.argmax(-1)).sum())
            measured = (loss / tokens, kl / tokens, agree / tokens)
            rows.append(Row(variant, bits, rms_error, *measured, time.perf_counter() - began))
    return Comparison(tokens, dense.layers, dense.weights, dense_loss, rows)
