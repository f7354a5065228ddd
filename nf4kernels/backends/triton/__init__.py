"""The ops in Triton, for GPUs without a compiled library. Importing this imports Triton."""

from .choose import kernel_lines
from .combine_experts import combine_experts, combine_experts_dgrad, combine_experts_wgrad
from .dequantize import dequantize, dequantize_out
from .grouped_linear import grouped_linear
from .grouped_linear_dgrad import grouped_linear_dgrad
from .grouped_lora_grad import grouped_lora_grad
from .grouped_lora_inner import grouped_lora_inner
from .linear import linear
from .linear_dgrad import linear_dgrad
from .lora_grad import lora_grad
from .quantize import quantize, quantize_absmax
from .sort_by_expert import sort_by_expert

_FUNCTIONS = (
    quantize, quantize_absmax, dequantize, dequantize_out, linear, linear_dgrad, grouped_linear, grouped_linear_dgrad,
    lora_grad, grouped_lora_inner, grouped_lora_grad, sort_by_expert, combine_experts, combine_experts_dgrad,
    combine_experts_wgrad,
)  # fmt: skip
OPS = {function.__name__: function for function in _FUNCTIONS}
__all__ = ["OPS", "kernel_lines"]
