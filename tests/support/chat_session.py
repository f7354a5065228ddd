"""A small model with two adapters in directories, for the tests of chat."""

from pathlib import Path

import pytest
import torch
from support.chat_model import CHAT_TEMPLATE, chat_model

peft = pytest.importorskip("peft", reason="peft is not installed: no adapter is made")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: no adapter is made")


def adapter(directory: Path, base: Path, seed: int) -> Path:
    """Write a LoRA adapter whose two factors are random, so that it changes every answer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


def directories(folder: Path) -> dict[str, Path]:
    """A model ("model"), the same without a template ("plain"), and adapters "first" and "second" on it."""
    model = chat_model(folder / "model", initializer_range=0.2)
    made = {"model": model, "plain": chat_model(folder / "plain", template=None, initializer_range=0.2)}
    made |= {name: adapter(folder / name, model, seed) for seed, name in enumerate(("first", "second"))}
    return made


__all__ = ["CHAT_TEMPLATE", "adapter", "directories"]
