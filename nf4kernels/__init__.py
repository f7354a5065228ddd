"""4-bit NormalFloat weights, fused products with them, and LoRA fine-tuning through them."""

from . import codebook
from .backends.select import backend_info
from .functional import dequantize, linear, lora_linear, quantize
from .lora import LoraConfig
from .quant_linear import QuantLinear
from .quantized_weight import QuantizedWeight

__version__ = "0.1.0"
__all__ = [
    "LoraConfig",
    "QuantLinear",
    "QuantizedWeight",
    "backend_info",
    "codebook",
    "dequantize",
    "linear",
    "lora_linear",
    "quantize",
]
