"""What a product is given: checked, in the compute dtype, and told of where it will be slow."""

import sys
import warnings
from types import FrameType

import torch
from torch import Tensor

from .backends import select
from .modes import autocast_is_on
from .quantized_weight import WEIGHT_DTYPES, QuantizedWeight, WeightArgs

_untold = True  # that training in 16 bits is slow here


def check_weight(qweight: QuantizedWeight, who: str) -> None:
    if not isinstance(qweight, QuantizedWeight):
        raise TypeError(f"{who}: qweight must be a QuantizedWeight, got {type(qweight).__name__}")


def check_input(
    x: Tensor, weight_args: WeightArgs, bias: Tensor | None, who: str, bias_shape: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor | None]:
    """x and bias in the compute dtype: autocast's where it is on, else x's own. bias is [N] or of another shape."""
    packed, N, K = weight_args[0], weight_args[6], weight_args[7]
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in WEIGHT_DTYPES:
        came = f"{x.dtype}{_who_read_a_weight() if x.dtype == packed.dtype else ''}"
        raise TypeError(f"{who}: x must be float32, bfloat16 or float16, got {came}")
    shape, device = x.shape, x.device
    if len(shape) == 0 or shape[-1] != K:
        raise ValueError(f"{who}: x must have K={K} columns, got shape {list(shape)}")
    if device != packed.device:
        raise ValueError(f"{who}: x must be on {packed.device} as the weight is, got {device}")
    if autocast_is_on(device):
        x = x.to(torch.get_autocast_dtype(device.type))
    if _untold and x.requires_grad and x.dtype != torch.float32 and device.type == "cpu":
        _tell_of_slow_training(x.dtype)
    if bias is not None:
        if bias.shape != (bias_shape or (N,)):
            raise ValueError(f"{who}: bias must have shape {list(bias_shape or (N,))}, got {list(bias.shape)}")
        if bias.device != device:
            raise ValueError(f"{who}: bias must be on {device} as x is, got {bias.device}")
        bias = bias.to(x.dtype).contiguous()
    return x, bias


def _tell_of_slow_training(dtype: torch.dtype) -> None:
    """Once in a process: that 16 bits are slow on this CPU, if they are. Our products are not; a model's others are."""
    global _untold
    if torch.compiler.is_compiling():  # which has no warnings
        return
    _untold = False
    if not select.cpu_multiplies_bf16():
        warnings.warn(
            f"nf4kernels: training in {str(dtype).removeprefix('torch.')} is slow on this CPU, which runs without bf16"
            " instructions: torch's own products take up to 200 times as long in backward as in float32, and a step of"
            " SmolLM2-135M 15 times. nf4kernels.prepare_for_training(model) makes the dense parts float32; leave"
            " autocast off as well, which is a Trainer's bf16=False",
            stacklevel=2,
        )


def check_lora(x: Tensor, lora_A: Tensor, lora_B: Tensor, dropout_p: float, shape: tuple[int, ...], who: str) -> None:
    """That the LoRA term fits the input and a weight of this shape, [N, K] or [E, N, K]."""
    *experts, N, K = shape
    A_shape, B_shape = lora_A.shape, lora_B.shape
    leading = "".join(f"{size}, " for size in experts)
    if len(A_shape) != len(shape) or list(A_shape[:-2]) != experts or A_shape[-1] != K:
        raise ValueError(f"{who}: lora_A must have shape [{leading}r, {K}], got {list(A_shape)}")
    if B_shape != (*experts, N, A_shape[-2]):
        raise ValueError(f"{who}: lora_B must have shape [{leading}{N}, {A_shape[-2]}], got {list(B_shape)}")
    if lora_A.device != x.device or lora_B.device != x.device:
        came = f"{lora_A.device}, {lora_B.device}"
        raise ValueError(f"{who}: lora_A and lora_B must be on {x.device} as x is, got {came}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{who}: dropout_p must be in [0, 1), got {dropout_p}")


def _who_read_a_weight() -> str:
    """For an error over x in packed weights' dtype: which module's code called which of its layers, and the remedy."""
    frame: FrameType | None = sys._getframe(1)
    layer = None
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            layer = layer or module
            name = next((name for name, inner in module.named_modules() if name and inner is layer), None)
            if name is not None:
                return (
                    f"; {type(module).__qualname__}.{frame.f_code.co_name} gave it to {name}, perhaps cast to the dtype"
                    f" of a packed weight: leave that layer dense, quantize_model(model, skip=[{name!r}])"
                )
        frame = frame.f_back
    return ""
