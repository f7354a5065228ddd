"""LoRA: its configuration and how its factors start."""

import math
from dataclasses import dataclass

from torch import nn


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


def init_adapter(lora_A: nn.Linear, lora_B: nn.Linear, config: LoraConfig) -> None:
    """Start the factors in place so that their product is zero."""
    if config.init == "gaussian":
        nn.init.normal_(lora_A.weight, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
    nn.init.zeros_(lora_B.weight)
