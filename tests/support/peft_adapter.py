"""An adapter that PEFT made and saved, for a model directory, with factors that were trained (random ones)."""

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed: no adapter is made")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: no adapter is made")


def save_adapter(base, directory, seed=1, scale=0.05, safe=True, **settings):
    """The adapter's files in `directory`; every trainable tensor is drawn anew."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**{**options, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(directory, safe_serialization=safe)
    return directory


def merged_by_peft(base, adapter):
    """The dense model that PEFT's own merge makes of the two."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
