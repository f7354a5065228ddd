"""The dense model in memory, and the dtype of its parts."""

import warnings
from pathlib import Path
from typing import Any

import torch

STORED = torch.bfloat16  # what every file holds, and what the model is quantized from and merged into
# For rows of 20 tokens the backward of torch's fused CPU attention takes 2.8 ms a layer, the plain one 0.4.
ATTENTION = "eager"


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Of what is no adapter; buffers stay: rotary embeddings' frequencies are fp32 in a model of any dtype."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def load(directory: Path) -> tuple[Any, Any]:
    """(model in bf16, evaluating, its tokenizer) of a Hugging Face directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=STORED, attn_implementation=ATTENTION)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what TRL still calls
