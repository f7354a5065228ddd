"""4-bit NormalFloat weights, fused products with them, and LoRA fine-tuning through them."""

from . import codebook
from .entry import command_line_ends_in_one_line

with command_line_ends_in_one_line():  # a wrong environment variable is an error of the import
    from .backends.info import backend_info
from . import optim, recover
from .functional import dequantize, linear, lora_linear, quantize, quantize_experts
from .grouped import grouped_linear, grouped_lora_linear
from .model.adapters import disable_adapters, remove_adapter, set_adapter
from .model.merge import merge_model
from .model.prepare import prepare_for_training
from .model.quantize import quantize_model
from .model.report import QuantizeReport
from .nn.lora import LoraConfig
from .nn.quant_experts import QuantExperts
from .nn.quant_linear import QuantLinear
from .quantized_weight import QuantizedExperts, QuantizedWeight
from .routing import combine_experts, sort_by_expert
from .storage.adapters import load_adapters, save_adapters
from .storage.bitsandbytes_format import weight_from_tensors, weight_to_tensors
from .storage.checkpoint import load_checkpoint, save_checkpoint
from .version import VERSION

__version__ = VERSION
__all__ = [
    "LoraConfig",
    "QuantExperts",
    "QuantLinear",
    "QuantizeReport",
    "QuantizedExperts",
    "QuantizedWeight",
    "backend_info",
    "codebook",
    "combine_experts",
    "dequantize",
    "disable_adapters",
    "grouped_linear",
    "grouped_lora_linear",
    "linear",
    "load_adapters",
    "load_checkpoint",
    "lora_linear",
    "merge_model",
    "optim",
    "prepare_for_training",
    "quantize",
    "quantize_experts",
    "quantize_model",
    "recover",
    "remove_adapter",
    "save_adapters",
    "save_checkpoint",
    "set_adapter",
    "sort_by_expert",
    "weight_from_tensors",
    "weight_to_tensors",
]
