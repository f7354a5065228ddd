"""grouped_linear and grouped_lora_linear: the products of experts, with checks, defaults and gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops  # noqa: F401 (defines what the next lines hold)
from .autograd import GroupedLinear
from .autograd_lora import GroupedLoraLinear, composed_grouped_lora_linear, grouped_lora_forward
from .input_checks import check_input, check_lora
from .modes import is_transformed
from .quantized_weight import QuantizedExperts, WeightArgs

# Each lookup would cost every call 0.1 us.
_grouped_linear: Callable[..., Tensor] = torch.ops.nf4kernels.grouped_linear.default


def grouped_linear(x: Tensor, expert_offsets: Tensor, qweights: QuantizedExperts, bias: Tensor | None = None) -> Tensor:
    """x[rows of e] @ Ŵ[e].T + bias[e] for every expert e, without writing Ŵ to memory; differentiable in x and bias.

    On the CPU each expert's rows get the bits that `linear` gives them alone. Nothing waits for a device.

    Args:
        x: `[T, K]`, rows sorted by expert, float32, bfloat16 or float16, any strides. A non-contiguous x is copied.
            Under autocast x is first cast to autocast's dtype.
        expert_offsets: int32 `[E]` on x's device: the row past each expert's last one, which is the
            cumulative sum of the experts' row counts, as `offs` of torch's grouped_mm. An expert may have no rows.
        qweights: the `[E, N, K]` weight.
        bias: `[E, N]`, cast to x's dtype, or None.

    Returns:
        `[T, N]` in x's dtype; products are summed in fp32. Rows past the last offset are zeros, in the gradient too.

    Raises:
        TypeError: x or expert_offsets is of another dtype, or qweights is no QuantizedExperts.
        ValueError: a shape does not fit, or the tensors are on different devices.
        RuntimeError: on the CPU, offsets that fall or exceed T. A device takes each as min(offset, T), or as the one
            before it where that is larger.
    """
    who = "nf4kernels.grouped_linear"
    _check_experts(qweights, who)
    return grouped_linear_from_args(x, expert_offsets, qweights.op_args(), bias, who)


def grouped_lora_linear(
    x: Tensor,
    expert_offsets: Tensor,
    qweights: QuantizedExperts,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x[rows of e] @ Ŵ[e].T + scaling * dropout(x[rows of e]) @ lora_A[e].T @ lora_B[e].T + bias[e] for every expert e.

    Differentiable in x, lora_A, lora_B and bias, any number of times, and by torch.func's transforms; these, and a
    backward that is itself recorded, round each term to x's dtype before they add them, and take the LoRA inner
    products with all experts. An expert without rows has a gradient of zeros. Nothing waits for a device.

    Saved for backward: x, the packed weight, lora_A, lora_B, the LoRA inner product `[T, r]`, and the dropout mask.

    Args:
        x, expert_offsets, qweights, bias: as in `grouped_linear`.
        lora_A: `[E, r, K]`; lora_B: `[E, N, r]`. Cast to x's dtype for the product; their gradients come in their own.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout_p: probability of zeroing an element of x on the LoRA path, in [0, 1).

    Returns:
        `[T, N]` in x's dtype; rows past the last offset are zeros.

    Raises:
        As `grouped_linear`, and ValueError where lora_A or lora_B do not fit or dropout_p is out of range.

    Source: LoRA (arXiv 2106.09685), section 4.1; QLoRA (arXiv 2305.14314), equation 5.
    """
    who = "nf4kernels.grouped_lora_linear"
    _check_experts(qweights, who)
    lora = (lora_A, lora_B, scaling, dropout_p)
    return grouped_lora_linear_from_args(x, expert_offsets, qweights.op_args(), *lora, bias, who)


def grouped_linear_from_args(
    x: Tensor, expert_offsets: Tensor, weight_args: WeightArgs, bias: Tensor | None, who: str
) -> Tensor:
    """`grouped_linear` on the weight's op arguments."""
    x, expert_offsets, bias = _check_inputs(x, expert_offsets, weight_args, bias, who)
    if is_transformed(x, expert_offsets, bias):
        return composed_grouped_lora_linear(x, expert_offsets, None, None, bias, 1.0, 0.0, weight_args)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = GroupedLinear.apply(x, expert_offsets, bias, weight_args)
        return y
    return _grouped_linear(x, expert_offsets, *weight_args, bias)


def grouped_lora_linear_from_args(
    x: Tensor,
    expert_offsets: Tensor,
    weight_args: WeightArgs,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    bias: Tensor | None,
    who: str,
) -> Tensor:
    """`grouped_lora_linear` on the weight's op arguments."""
    x, expert_offsets, bias = _check_inputs(x, expert_offsets, weight_args, bias, who)
    shape = (weight_args[0].shape[0], weight_args[6], weight_args[7])
    check_lora(x, lora_A, lora_B, dropout_p, shape, who)
    arguments = (x, expert_offsets, lora_A, lora_B, bias, scaling, dropout_p, weight_args)
    tensors = (x, lora_A, lora_B, bias)
    if is_transformed(expert_offsets, *tensors):
        return composed_grouped_lora_linear(*arguments)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        y: Tensor = GroupedLoraLinear.apply(*arguments)
        return y
    return grouped_lora_forward(*arguments)[0]


def _check_experts(qweights: QuantizedExperts, who: str) -> None:
    if not isinstance(qweights, QuantizedExperts):
        raise TypeError(f"{who}: qweights must be a QuantizedExperts, got {type(qweights).__name__}")


def _check_inputs(
    x: Tensor, expert_offsets: Tensor, weight_args: WeightArgs, bias: Tensor | None, who: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x and bias in the compute dtype, and the offsets contiguous."""
    E, N = weight_args[0].shape[0], weight_args[6]
    x, bias = check_input(x, weight_args, bias, who, (E, N))
    if x.dim() != 2:
        raise ValueError(f"{who}: x must be 2-D [T, K], got shape {list(x.shape)}")
    if not isinstance(expert_offsets, Tensor) or expert_offsets.dtype != torch.int32:
        came = expert_offsets.dtype if isinstance(expert_offsets, Tensor) else type(expert_offsets).__name__
        raise TypeError(f"{who}: expert_offsets must be an int32 tensor, got {came}")
    if expert_offsets.shape != (E,):
        raise ValueError(f"{who}: expert_offsets must have shape [{E}], got {list(expert_offsets.shape)}")
    if expert_offsets.device != x.device:
        raise ValueError(f"{who}: expert_offsets must be on {x.device} as x is, got {expert_offsets.device}")
    return x, expert_offsets.contiguous(), bias
