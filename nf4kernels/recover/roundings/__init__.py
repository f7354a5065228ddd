"""Roundings with the same bytes: each is given to `quantize_model(rounding=)` and ends in the same format."""

from .awq import Awq
from .gptq import Gptq
from .lq_lora import LqLora
from .rounding import CalibratedRounding, ScaleSearch

__all__ = ["Awq", "CalibratedRounding", "Gptq", "LqLora", "ScaleSearch"]
