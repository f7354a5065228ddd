"""A small model for adapters, and the names of PEFT's two files."""

import torch
from torch import nn

import nf4kernels as nf4

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(32, 32, bias=False)
        self.up_proj = nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.lm_head = nn.Linear(32, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in ("q_proj", "up_proj", "down_proj")]


def quantized(lora=None, skip=("lm_head",)):
    model = Net().requires_grad_(False)  # the adapters alone are trained
    nf4.quantize_model(model, skip=skip, lora=lora, progress=False)
    return model


def randomize(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def set_lora(model, names, **config):
    for name in names:
        layer = model.get_submodule(name)
        layer.lora = layer.lora_A = layer.lora_B = None
        layer.add_lora(nf4.LoraConfig(**config), dtype=torch.float32)
