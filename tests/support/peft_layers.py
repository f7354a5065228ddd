"""One layer under PEFT, and PEFT's own computation beside ours."""

import pytest
import torch
from torch import nn

import nf4kernels as nf4

pytest.importorskip("peft", reason="PEFT is not installed")
import peft
from peft.tuners import lora

import nf4kernels.integrations.peft

K, N = 192, 160
# Whether PEFT lets several adapters target parameters.
SEVERAL_ON_PARAMETERS = hasattr(lora.ParamWrapper, "get_delta_factors")


class One(nn.Module):
    """A model of one layer, `layer`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def dense(dtype=torch.float32, bias=True, shape=(N, K)) -> nn.Linear:
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    nn.init.normal_(linear.weight, std=shape[1] ** -0.5)
    return linear


def adapted(layer: nn.Module, autocast_adapter_dtype=True, fill=True, names=("default",), **options):
    """(PEFT's model of that one layer, its LoRA layer), adapters whose term is not zero."""
    config = peft.LoraConfig(**{"target_modules": ["layer"], "r": 8, "lora_alpha": 12, **options})
    model = peft.get_peft_model(
        One(layer), config, adapter_name=names[0], autocast_adapter_dtype=autocast_adapter_dtype
    )
    for name in names[1:]:
        model.add_adapter(name, config)
    if fill:
        fill_adapters(model)
    return model, model.base_model.model.layer


def fill_adapters(model: nn.Module, std=0.1) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)


def quantized(dtype=torch.float32, bias=True, shape=(N, K), **options) -> nf4.QuantLinear:
    return nf4.QuantLinear.from_linear(dense(dtype, bias, shape), **options)


def peft_forward(layer: nn.Module, *args, **kwargs):
    """What PEFT's own code makes of the same layer: each product apart."""
    return lora.Linear.forward(layer, *args, **kwargs)


def sum_of_weights(layer, name="default") -> torch.Tensor:
    """Ŵ + scaling * B @ A in fp64."""
    A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    return layer.get_base_layer().dequantize(torch.float32).double() + layer.scaling[name] * B @ A
