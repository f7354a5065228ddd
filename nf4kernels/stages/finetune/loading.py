"""The tokenizer and the model of a recipe."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ...model.prepare import prepare_for_training
from ...model.training import training_dtype
from ..base_directory import directory_of
from ..causal_model import quantization_of
from ..errors import StageError
from .processes import load_for_sharding
from .recipe import DENSE, Recipe

OF_WEIGHTS = ("codebook", "block_size", "double_quant", "scale_codebook", "skip", "plan")  # that are quantized here


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
    tokenizer.chat_template = _template(recipe) or tokenizer.chat_template
    return tokenizer


def _template(recipe: Recipe) -> str | None:
    """The recipe's own chat template; StageError where it is no file: TRL would take a model's after the examples."""
    path = recipe.training.chat_template_path
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"--chat_template_path must be a Jinja file, got {path}: {in_one_line(error)}") from None


def load_processor(recipe: Recipe) -> Any:
    """Of a vision-language model: its tokenizer, what makes tensors of images, and a chat template.

    Raises:
        StageError: the model takes no images, or has no chat template.
    """
    model = recipe.model
    try:
        processor = AutoProcessor.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=recipe.training.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StageError(f"--model_name_or_path must be a directory with a model and its processor, got"
                         f" {model.model_name_or_path}: {in_one_line(error)}") from None  # fmt: skip
    if getattr(processor, "image_processor", None) is None:
        raise StageError(
            f"--model_name_or_path must be a vision-language model, since the data has images, got"
            f" {model.model_name_or_path}"
        )
    processor.chat_template = _template(recipe) or processor.chat_template
    if not processor.chat_template:
        raise StageError("--chat_template_path must be a Jinja file, since the data has images, got none")  # fmt: skip
    return processor


def load_model(recipe: Recipe, has_images: bool = False) -> Any:
    """In 4 bits: quantized as it is read, or as a 4-bit directory has it; or dense; where the trainer wants it."""
    architectures: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
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
        said = sorted(recipe.flagged & set(OF_WEIGHTS)) if stored is not None else []
        if said:
            raise StageError(f"--{said[0]} must be left out for a model that is stored in 4 bits, got {where}")
        wanted = recipe.quantization if stored is None else quantization_of(where, stored, False)
        if wanted is not None:  # transformers takes None for a wish to forget the stored one
            options["quantization_config"] = wanted
        device = recipe.training.device
        has_own_place = load_for_sharding(recipe.training) or is_deepspeed_zero3_enabled()  # which place it themselves
        if not has_own_place and device.type != "cpu":
            options["device_map"] = {"": device}
        model = architectures.from_pretrained(
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


def with_adapter(model: Any, adapter: Path, recipe: Recipe) -> PeftModel:
    """`model`, which is the recipe's, with an adapter to go on from, trainable.

    Raises:
        StageError: it is another model's, or does not fit.
    """
    base, where = recipe.lora.base_model_name_or_path, str(recipe.model.model_name_or_path)
    found = directory_of(base, adapter) if base else None
    if found is not None and Path(where).is_dir() and not found.samefile(where):
        raise StageError(f"--adapter must be of the model {where}, got one of {base}")
    try:
        adapted = PeftModel.from_pretrained(
            model, str(adapter), is_trainable=True, autocast_adapter_dtype=not is_deepspeed_zero3_enabled()
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise StageError(f"--adapter must fit the model, got {adapter}: {in_one_line(error)}") from None
    stored = set(load_peft_weights(str(adapter), device="cpu"))
    made = set(get_peft_model_state_dict(adapted))
    if stored != made:
        raise StageError(f"--adapter must have the tensors of the model's adapters, got {adapter}, which differs"
                         f" in {sorted(stored ^ made)[0]}")  # fmt: skip
    adapted.peft_config["default"].base_model_name_or_path = where  # a directory that was moved has another name
    return adapted


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
