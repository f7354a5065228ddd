"""PEFT on layers in 4 bits: importing this makes its LoRA, DoRA and merge know QuantLinear and QuantExperts.

Nothing needs to be called: models that PEFT wraps from then on get our layers, whichever library was imported first and
whether or not a configuration is at hand, `PeftModel.from_pretrained(model, directory)` included.
"""

from ..requirement import require

require("peft")  # before the next lines import what an older one lacks

from .dispatch import install
from .experts import QuantExpertsWrapper
from .loftq import replace_lora_weights_loftq
from .lora import LoraQuantLinear
from .merge import merge_into

__all__ = ["LoraQuantLinear", "QuantExpertsWrapper", "merge_into", "replace_lora_weights_loftq"]

install()
