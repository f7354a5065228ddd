"""A causal language model and its tokenizer, of a directory that is dense or in 4 bits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..integrations.transformers import Nf4Config
from .errors import StageError, first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_causal_model(base: Path | str, dense: bool = False) -> Any:
    """The model of a directory, or of a name on the Hub, on the GPU where there is one.

    One in 4 bits stays so; one that is not is quantized to NF4 as it loads, or left as it is with `dense`.

    Raises:
        StageError: it is no causal language model, or in 4 bits already with `dense`.
    """
    try:
        stored = getattr(AutoConfig.from_pretrained(str(base)), "quantization_config", None)
        quantization = quantization_of(base, stored, dense)
        options: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
        if quantization is not None:  # transformers takes None for a wish to forget the stored one
            options["quantization_config"] = quantization
        return AutoModelForCausalLM.from_pretrained(str(base), dtype="auto", **options)
    except StageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"MODEL must be a causal language model, got {base}: {first_line(error)}") from None


def quantization_of(base: Path | str, stored: Any, dense: bool) -> Nf4Config | None:
    """What from_pretrained is to be told of a directory whose config has `stored`; None is nothing."""
    if stored is None:
        return None if dense else Nf4Config()
    if dense:
        raise StageError(f"--dense must be left out for a model that is in 4 bits already, got {base}")
    fields: Mapping[str, Any] = stored if isinstance(stored, Mapping) else stored.to_dict()
    if fields.get("quant_method") == "nf4kernels":
        return None
    config = Nf4Config()
    if fields.get("load_in_4bit"):
        config.codebook = fields.get("bnb_4bit_quant_type", "fp4")
        config.block_size = None  # bitsandbytes' configuration does not say it, the weights do
    return config


def load_tokenizer(directories: Sequence[Path | str]) -> Any:
    """The first that has a chat template, for a fine-tune may have brought one, or else the first.

    Raises:
        StageError: there is none, or one does not load.
    """
    found = []
    for directory in dict.fromkeys(map(str, directories)):
        if Path(directory).is_dir() and not any((Path(directory) / file).is_file() for file in TOKENIZER_FILES):
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise StageError(f"the tokenizer in {directory} must load: {first_line(error)}") from None
        if tokenizer.chat_template:
            return tokenizer
        found.append(tokenizer)
    if not found:
        raise StageError(f"MODEL must have a tokenizer beside it, got {directories[0]}")
    return found[0]
