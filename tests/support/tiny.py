"""Tiny models, randomly initialised, for tests of what surrounds the layers."""

import pytest
import torch
from torch import nn

import nf4kernels as nf4

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(3, 13).view(2, 5)


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def make(class_name: str, config_name: str | None = None, dtype=torch.float32, **changes) -> nn.Module:
    """A model of a class of transformers, by name, with SIZES and `changes`, evaluating."""
    library = transformers()
    model_class = getattr(library, class_name)
    config_class = model_class.config_class if config_name is None else getattr(library, config_name)
    torch.manual_seed(0)
    return model_class(config_class(**{**SIZES, **changes})).to(dtype).eval()


def llama(dtype=torch.float32, **changes) -> nn.Module:
    return make("LlamaForCausalLM", dtype=dtype, **changes)


def quantized_llama(dtype=torch.float32, lora=None, **changes) -> nn.Module:
    model = llama(dtype, **changes)
    nf4.quantize_model(model, lora=lora, progress=False)
    return model


def layers(model: nn.Module) -> dict[str, nf4.QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nf4.QuantLinear)}


def fill_adapters(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Adapters whose term is not zero, as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


class Net(nn.Module):
    """Two blocks and a head, without any library."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(16, 64, dtype=dtype)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(64, 64, dtype=dtype), nn.ReLU(), nn.Linear(64, 64, dtype=dtype)) for _ in range(2)]
        )
        self.norm = nn.LayerNorm(64, dtype=dtype)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)
