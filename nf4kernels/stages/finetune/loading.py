"""The tokenizer and the model of a recipe."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...model.prepare import prepare_for_training
from ...model.training import training_dtype
from ..errors import StageError
from .recipe import DENSE, Recipe


def load_tokenizer(recipe: Recipe) -> Any:
    model = recipe.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=recipe.training.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"--model_name_or_path must be a directory with a model and its tokenizer, got"
                         f" {model.model_name_or_path}: {in_one_line(error)}") from None  # fmt: skip
    if tokenizer.eos_token is None:
        raise StageError(
            f"--model_name_or_path must have an EOS token in its tokenizer, got {model.model_name_or_path}"
        )
    template = recipe.training.chat_template_path
    if template is not None and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    return tokenizer


def load_model(recipe: Recipe) -> Any:
    """In 4 bits: quantized as it is read, or as a 4-bit directory has it; or dense; where the trainer wants it."""
    options = {
        "revision": recipe.model.model_revision, "trust_remote_code": recipe.training.trust_remote_code,
    }  # fmt: skip
    where = recipe.model.model_name_or_path
    try:
        stored = getattr(AutoConfig.from_pretrained(where, **options), "quantization_config", None)
        if recipe.quantization is None and stored is not None:
            raise StageError(
                f"--codebook must be left out for a model that is stored in 4 bits, got {DENSE} for {where}"
            )
        if stored is None and recipe.quantization is not None:
            options["quantization_config"] = recipe.quantization
        device = recipe.training.device
        if device.type != "cpu":
            options["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=recipe.dtype, attn_implementation=recipe.model.attn_implementation, **options
        )
    except StageError:
        raise
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise StageError(
            f"--model_name_or_path must be a model that can be loaded, got {where}: {in_one_line(error)}"
        ) from None
    if recipe.quantization is None:  # PEFT freezes it, and the trainer turns its checkpointing on
        return model.float() if training_dtype(device) == torch.float32 else model
    return prepare_for_training(model, checkpointing=recipe.training.gradient_checkpointing)


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
