"""What it costs to merge an adapter into 4 bits: the loss on a text of the base, with the adapter, and merged."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .causal_model import load_causal_model, load_tokenizer
from .errors import StageError, first_line
from .text_loss import batches_of, held_out_loss, windows_of

LENGTH = 512  # tokens of a window


@dataclass(frozen=True)
class Text:
    """A text that the model was not trained on, as windows of token ids."""

    windows: list[list[int]]

    @property
    def tokens(self) -> int:
        """How many there are to predict; the first of each window is context alone."""
        return sum(len(window) - 1 for window in self.windows)


def tokenized_text(file: Path, base: Path, adapter: Path, tokens: int = 2048) -> Text:
    """The first `tokens` tokens of a .txt, or of the `text` of a .jsonl's lines, by the model's tokenizer.

    Raises:
        StageError: the file is not as it must be, or there is no tokenizer.
    """
    if tokens < 1:
        raise StageError(f"--tokens must be at least 1, got {tokens}")
    return Text(windows_of(file, load_tokenizer([adapter, base]), LENGTH, tokens))


def losses_with_adapter(base: Path, adapter: Path, text: Text) -> tuple[float, float]:
    """(the base's loss as its directory has it, dense or in 4 bits; its loss with the adapter), in nats a token.

    Raises:
        StageError: the base is no causal language model, or the adapter does not fit it.
    """
    model = load_causal_model(base, dense=not _is_quantized(base))
    try:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise StageError(f"the adapter {adapter} must fit {base}: {first_line(error)}") from None
    with model.disable_adapter():
        alone = _loss(model, text)
    adapted = _loss(model, text)
    del model
    _free()
    return alone, adapted


def loss_of(directory: Path, text: Text) -> float:
    """The loss of the model in a directory, in nats a token; StageError where it is none."""
    loss = _loss(load_causal_model(directory, dense=not _is_quantized(directory)).eval(), text)
    _free()
    return loss


def _is_quantized(directory: Path) -> bool:
    return bool(json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config"))


def _loss(model: Any, text: Text) -> float:
    return held_out_loss(model, batches_of(text.windows, model.device))


def _free() -> None:
    """Give back what a model that is gone held, in cycles and on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
