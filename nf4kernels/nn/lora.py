"""LoRA: its configuration, how its factors start, and how they are multiplied where more than a product is wanted."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scaling and start of a LoRA adapter.

    Attributes:
        r: rank, at least 1.
        alpha: scaling numerator.
        dropout: probability of zeroing an input element of the LoRA path while training, in [0, 1).
        use_rslora: scale by alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r.
        init: "default" (A Kaiming uniform, B zero) or "gaussian" (A normal with deviation 1/r, B zero), PEFT's two.

    Raises:
        ValueError: a field is out of its range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    use_rslora: bool = False
    init: str = "default"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"nf4kernels.LoraConfig: r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"nf4kernels.LoraConfig: dropout must be in [0, 1), got {self.dropout}")
        if self.init not in ("default", "gaussian"):
            raise ValueError(f"nf4kernels.LoraConfig: init must be 'default' or 'gaussian', got {self.init!r}")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def check_adapter_name(name: str, who: str) -> None:
    """ValueError for what cannot be a part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{who}: name must be a word that can be a module's name, got {name!r}")


def init_adapter(lora_A: nn.Linear, lora_B: nn.Linear, config: LoraConfig) -> None:
    """Start the factors in place so that their product is zero."""
    if config.init == "gaussian":
        nn.init.normal_(lora_A.weight, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
    nn.init.zeros_(lora_B.weight)


class WaitingAdapter(nn.Module):
    """An adapter that is not the active one of its layer: kept with it, frozen, and multiplied with nothing."""

    def __init__(self, config: LoraConfig, lora_A: nn.Linear, lora_B: nn.Linear) -> None:
        super().__init__()
        self.config, self.lora_A, self.lora_B = config, lora_A, lora_B
        self.requires_grad_(False)


def plain_weight(factor: nn.Linear) -> Tensor | None:
    """The weight of a factor that is a product with it and no more; None where someone wants the module to be called.

    That is: hooks, another forward (accelerate sets one on the instance), a parametrization (another class), a bias.
    By the instance's dictionary: an attribute look-up of nn.Module takes 0.6 us.
    """
    own = factor.__dict__
    parameters = own["_parameters"]
    if (
        type(factor) is not nn.Linear
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or parameters.get("bias") is not None
    ):
        return None
    weight = parameters.get("weight")
    return factor.weight if weight is None else weight  # a plain attribute where sharding made it one


def called_term(x: Tensor, lora_A: nn.Module, lora_B: nn.Module, scaling: float, dropout_p: float) -> Tensor:
    """scaling * lora_B(lora_A(dropout(x))): the modules are called, each with its input in the dtype of its weight."""
    if dropout_p > 0:
        x, _ = torch.native_dropout(x, dropout_p, True)
    for factor in (lora_A, lora_B):
        weight = getattr(factor, "weight", None)
        x = factor(x if weight is None else x.to(weight.dtype))
    return scaling * x
