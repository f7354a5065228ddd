"""A Hugging Face directory's model without its weights, where transformers is installed and knows it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..storage.published.gguf_file import GgufFile
from .errors import CommandError


def meta_model(in_dir: Path, config: dict, verb: str = "quantize") -> tuple[nn.Module | None, str]:
    """(the model on the meta device, its class), or (None, why not)."""
    architecture = (config.get("architectures") or [""])[0]
    try:
        import transformers
    except ImportError:
        return None, "their names (transformers is not installed)"
    model_class = getattr(transformers, architecture, None) if architecture else None
    if model_class is None:
        known = f"transformers {transformers.__version__} does not know {architecture or 'the model'}"
        return None, f"their names ({known})"
    try:
        with torch.device("meta"):
            if in_dir.is_dir():
                model = model_class(model_class.config_class.from_pretrained(in_dir))
            else:
                model = model_class(model_class.config_class.from_dict(config))
    except Exception as error:  # what a model's class raises about its configuration has no common type
        raise CommandError(f"{verb}: {in_dir}/config.json must describe a {architecture}, got {error!r}") from None
    model.tie_weights()
    return model, architecture


def gguf_config(file: Path) -> dict[str, Any]:
    """The configuration of the model in a GGUF file, as transformers tells it from the file's metadata."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise CommandError("convert: transformers must be installed to tell the model of a GGUF file") from None
    try:
        metadata = GgufFile(file).metadata
    except ValueError as error:
        raise CommandError(f"convert: {error}") from None
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise CommandError(f"convert: SRC must be a causal language model, got {type(config).__name__}") from None
    except Exception as error:  # what transformers raises about a file has no common type
        raise CommandError(f"convert: SRC must be a GGUF file that transformers knows, got {error}") from None
    told = config.to_dict()
    width = metadata.get(f"{metadata.get('general.architecture')}.attention.key_length")
    if width and "head_dim" in told:  # which transformers 5.24 leaves at the default of some models
        told["head_dim"] = width
    return {**told, "architectures": [model_class.__name__], "dtype": told.get("dtype") or "bfloat16"}


def save_gguf_tokenizer(file: Path, out_dir: Path) -> None:
    """The tokenizer of a GGUF file, where it has one."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out_dir)
    except Exception as error:  # what transformers raises about a file has no common type
        print(f"note: the tokenizer was not converted: {error}")
