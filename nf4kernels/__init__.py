"""4-bit NormalFloat weights, fused products with them, and LoRA fine-tuning through them."""

from . import codebook
from .adapters import load_adapters, save_adapters
from .backends.select import backend_info
from .checkpoint import load_checkpoint, save_checkpoint, weight_from_tensors, weight_to_tensors
from .functional import dequantize, grouped_linear, linear, lora_linear, quantize, quantize_experts
from .lora import LoraConfig
from .model import QuantizeReport, merge_model, quantize_model
from .quant_experts import QuantExperts
from .quant_linear import QuantLinear
from .quantized_weight import QuantizedExperts, QuantizedWeight

__version__ = "0.1.0"
__all__ = [
    "LoraConfig",
    "QuantExperts",
    "QuantLinear",
    "QuantizeReport",
    "QuantizedExperts",
    "QuantizedWeight",
    "backend_info",
    "codebook",
    "dequantize",
    "grouped_linear",
    "linear",
    "load_adapters",
    "load_checkpoint",
    "lora_linear",
    "merge_model",
    "quantize",
    "quantize_experts",
    "quantize_model",
    "save_adapters",
    "save_checkpoint",
    "weight_from_tensors",
    "weight_to_tensors",
]
