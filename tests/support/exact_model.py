"""A quantized model once more in fp64, with the exact Ŵ, and the bound on what another order of sums may differ."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import nf4kernels as nf4
from nf4kernels.model.walk import set_submodule


class ExactLinear(nn.Module):
    """What a QuantLinear computes, in fp64, Ŵ never rounded."""

    def __init__(self, layer: nf4.QuantLinear):
        super().__init__()
        self.weight = nn.Parameter(layer.dequantize(torch.float32).double(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().double(), layer.bias.requires_grad)
        self.lora_A, self.lora_B, self.scaling = (
            layer.lora_A,
            layer.lora_B,
            0 if layer.lora is None else layer.lora.scaling,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.lora_A is None else y + self.scaling * self.lora_B(self.lora_A(x))


def exact(model: nn.Module) -> nn.Module:
    """A copy in fp64; experts without adapters."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, nf4.QuantLinear):
            set_submodule(made, name, ExactLinear(module))
        elif isinstance(module, nf4.QuantExperts):
            set_submodule(made, name, module.to_experts(torch.float32).requires_grad_(False))
    made.config._experts_implementation = "eager"  # transformers' grouped one takes no fp64
    return made.double()


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters are changed by one eps up or down: as right as the model, with other rounding errors."""
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.is_floating_point():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.data.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
    return made


def assert_as_good(actual: Tensor, others: Sequence[Tensor], exact: Tensor, what: str, times: float = 2) -> None:
    """As the bound of docs/design.md, section 7: at most `times` the error of the worst other, and 1.5 eps of all.

    Training makes a few directions of a model's rounding errors so much larger than the rest that its error is as a
    single random number, where that of a product is the mean of many. There `times` is 4, of a few others, of which
    one is hardly small by luck.
    """
    error, *rest = ((each.double() - exact.double()).norm().item() for each in (actual, *others))
    allowed = times * max(rest) + 1.5 * torch.finfo(actual.dtype).eps * exact.norm().item()
    assert error <= allowed, f"{what} has error {error:.3g}, {allowed:.3g} is allowed"
