"""A Hugging Face directory's model without its weights, where transformers is installed and knows it."""

from pathlib import Path

import torch
from torch import nn

from .errors import CommandError


def meta_model(in_dir: Path, config: dict) -> tuple[nn.Module | None, str]:
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
            model = model_class(model_class.config_class.from_pretrained(in_dir))
    except Exception as error:  # what a model's class raises about its configuration has no common type
        raise CommandError(f"quantize: {in_dir}/config.json must describe a {architecture}, got {error!r}") from None
    model.tie_weights()
    return model, architecture
