"""What stands in place of bitsandbytes' own functions and methods while it is patched.

Each does what its original does, for every caller that finds it by name; the originals, where one is held elsewhere,
come to our kernels by `torch.ops.bitsandbytes`. They go round that op where they can: a kernel in Python costs a call
some 10 us, and has no gradient.
"""

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.autograd import _functions
from bitsandbytes.nn import modules
from torch import Tensor

from ... import ops  # noqa: F401 (defines what the next lines hold)
from ...autograd import Linear, composed_linear
from ...codebook import SCALE_CODEBOOKS
from ...modes import autocast_is_on, is_transformed, outside_inference_mode
from ...quantized_weight import BLOCK_SIZES, SUPERBLOCK, WEIGHT_DTYPES
from .quant_state import is_repacked, matrix_shape, restored, weight_args

DEVICES = {"cpu"}  # device types on which our kernels stand; a GPU's is added when it is initialised
_ops: Any = torch.ops.nf4kernels
_linear = _ops.linear.default
_linear_dgrad = _ops.linear_dgrad.default
_dequantize = _ops.dequantize.default
_without_torch_function = torch._C.DisableTorchFunctionSubclass  # Params4bit's costs each call of an op 8 us
# Before 0.50 the orientation of the packed tensor said whether the weight is [N, K] or [K, N], since then its shape.
ORIENTED = not hasattr(torch.ops.bitsandbytes, "gemm_4bit")

_matmul_4bit = _functions.matmul_4bit
_quantize_4bit = functional.quantize_4bit
_dequantize_4bit = functional.dequantize_4bit
_forward = modules.Linear4bit.forward


@outside_inference_mode
def quantize_4bit(
    A: Tensor, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_type="fp4",
    quant_storage=torch.uint8,
) -> tuple[Tensor, Any]:  # fmt: skip
    """As bitsandbytes', which quantizes by our op; its nested scales and their mean are ours too."""
    if A.device.type not in DEVICES or not compress_statistics:
        return _quantize_4bit(A, absmax, out, blocksize, compress_statistics, quant_type, quant_storage)
    packed, state = _quantize_4bit(A, None, out, blocksize, False, quant_type, quant_storage)
    if state.absmax.numel() and not state.absmax.amax().isfinite():
        index = (~A.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"bitsandbytes.quantize_4bit (nf4kernels): A must be finite, got {A[tuple(index)]} at {index}")
    dynamic = SCALE_CODEBOOKS["dynamic8"].to(A.device, copy=True)  # bitsandbytes 0.49 writes into its own
    scales, scale_absmax, offset = _ops.quantize_absmax(state.absmax, dynamic, False)
    state.absmax = scales if absmax is None else absmax.copy_(scales)
    state.offset, state.nested = offset, True
    state.state2 = functional.QuantState(
        absmax=scale_absmax, code=dynamic, blocksize=SUPERBLOCK, dtype=torch.float32
    )  # fmt: skip
    return packed, state


def dequantize_4bit(A: Tensor, quant_state=None, absmax=None, out=None, blocksize=None, quant_type="fp4") -> Tensor:
    """As bitsandbytes', with nested scales decoded on the way, and a weight of two elements in its own shape."""
    if quant_state is not None and is_repacked(quant_state):
        A, quant_state = restored(A, quant_state)
    if quant_state is None or out is not None or not _is_ours(A, quant_state):
        return _dequantize_4bit(A, quant_state, absmax, out, blocksize, quant_type)
    N, K = matrix_shape(quant_state.shape)
    with _without_torch_function():
        values = _dequantize(*weight_args(A, quant_state, N, K), 0, N, 0, K, quant_state.dtype)
        values = values.view(*quant_state.shape)
    return values.t() if A.shape[0] == 1 and A.numel() > 1 else values  # bitsandbytes' [1, n] means: transposed


def _is_ours(A: Tensor, state: functional.QuantState) -> bool:
    return A.device.type in DEVICES and state.blocksize in BLOCK_SIZES and state.dtype in WEIGHT_DTYPES


def matmul_4bit(A: Tensor, B: Tensor, quant_state, out=None, bias=None) -> Tensor:
    """A @ Ŵ.T + bias, by one op and differentiable in A and bias."""
    if quant_state is None or A.device.type not in DEVICES or len(quant_state.shape) != 2:
        return _matmul_4bit(A, B, quant_state, out, bias)
    is_transposed = ORIENTED and B.shape[0] != 1
    if is_repacked(quant_state):
        (B, quant_state), is_transposed = restored(B, quant_state), False
    if A.shape[-1] != quant_state.shape[1] or is_transposed:  # a weight of [K, N], or an error
        return _matmul_4bit(A, B, quant_state, out, bias)
    if autocast_is_on(A.device):  # as of bitsandbytes, whose product is torch's
        A = A.to(torch.get_autocast_dtype(A.device.type))
    with _without_torch_function():
        y = _product(A, B, quant_state, bias)
    return y if out is None else out.copy_(y)


def _product(A: Tensor, B: Tensor, state: functional.QuantState, bias: Tensor | None) -> Tensor:
    """In A's dtype, whatever autocast says."""
    weight = weight_args(B, state, *state.shape)
    if bias is not None:
        bias = bias.to(A.dtype)
    if is_transformed(A, bias):
        return composed_linear(A, bias, weight)
    if torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = Linear.apply(A, bias, weight)
        return y
    return _linear(A, *weight, bias)


def matmul_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """`MatMul4Bit.backward` without a dense copy of the weight, for who holds bitsandbytes' own matmul_4bit."""
    need_A, _, _, need_bias, _ = ctx.needs_input_grad
    if ctx.is_empty:
        zeros = torch.zeros_like(ctx.A) if need_A else None
        return zeros, None, None, torch.zeros_like(ctx.bias) if need_bias else None, None
    dA = dbias = None
    if need_bias:
        dbias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0, dtype=ctx.dtype_bias)
    if need_A:
        B, state = ctx.tensors[1], ctx.state
        N, K = state.shape
        is_transposed = B.shape[0] != 1 if ORIENTED else grad_output.shape[-1] != N  # a weight of [K, N]
        with _without_torch_function():
            weight = weight_args(B, state, N, K)
            dA = _linear(grad_output, *weight, None) if is_transposed else _linear_dgrad(grad_output, *weight)
    return dA, None, None, dbias, None


def linear4bit_forward(self: Any, x: Tensor) -> Tensor:
    """`Linear4bit.forward`, which leaves weight and bias as they are."""
    if x.device.type not in DEVICES:
        return _forward(self, x)
    parameters = self._parameters  # each look-up by nn.Module costs 0.6 us
    weight = parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is None:
        modules.fix_4bit_weight_quant_state_from_module(self)
        weight = self.weight
        state = weight.quant_state
    if is_repacked(state):
        state = restore_weight(self)
    if not self.compute_type_is_set:
        self.set_compute_type(x)
        self.compute_type_is_set = True
    in_dtype, compute_dtype = x.dtype, self.compute_dtype
    if compute_dtype is not None and compute_dtype != in_dtype:
        x = x.to(compute_dtype)
    if x.shape[-1] != state.shape[1]:
        raise ValueError(f"Linear4bit (nf4kernels): x must have K={state.shape[1]} columns, got {list(x.shape)}")
    bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (get would look both up)
    with _without_torch_function():
        y = _product(x, weight, state, bias)
    return y if y.dtype == in_dtype else y.to(in_dtype)


def restore_weight(module: Any) -> functional.QuantState:
    """The layer's quant state, its weight no longer repacked."""
    weight = module.weight
    weight.data, weight.quant_state = unpacked(weight.data, weight.quant_state)
    module.quant_state = weight.quant_state
    return module.quant_state


def leave_packed(qweight: Tensor, quant_state: functional.QuantState, block_n: int = 32) -> tuple[Tensor, Any]:
    """In place of `_convert_weight_packed_for_cpu`: our kernels take the weight as it is."""
    return qweight, quant_state


def unpacked(packed_weight: Tensor, quant_state: functional.QuantState, block_n: int = 32) -> tuple[Tensor, Any]:
    """In place of `_convert_weight_packed_for_cpu_inverse`: exact or a RuntimeError, and nothing for what is packed
    as bitsandbytes quantized it. The quant state is written in place, as it is there."""
    if is_repacked(quant_state):
        packed_weight, state = restored(packed_weight, quant_state)
        vars(quant_state).update(vars(state))
    return packed_weight, quant_state
