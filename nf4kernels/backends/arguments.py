"""The checks of the ops' arguments for the backends in Python: Triton and the reference.

A message names the op, the argument, what was expected and what came, in the words of csrc/bindings/checks.h. No check
reads a tensor's data, so none waits for the device.
"""

import functools
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from ..quantized_weight import (
    BLOCK_SIZES,
    INT8_LEVELS,
    LEVELS,
    SUPERBLOCK,
    WEIGHT_DTYPES,
    WeightArgs,
    expert_columns,
    scales_of,
)


def refuse(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"nf4kernels.{op}: {message}")


def check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in WEIGHT_DTYPES:
        refuse(op, f"{name} must be float32, bfloat16 or float16, got {dtype}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        refuse(op, f"{name} must be on {device}, got {tensor.device}")


def check_data(op: str, device: torch.device, name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    """A contiguous tensor of `count` elements."""
    check_device(op, name, tensor, device)
    if tensor.dtype != dtype:
        refuse(op, f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.numel() != count:
        refuse(op, f"{name} must have {count} elements, got shape {list(tensor.shape)}")
    if not tensor.is_contiguous():
        refuse(op, f"{name} must be contiguous, got strides {list(tensor.stride())}")


def check_block_size(op: str, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        refuse(op, f"block_size must be a power of two from 16 to 4096, got {block_size}")


def check_code(op: str, device: torch.device, code: Tensor) -> None:
    """16 levels, or int8's 256."""
    check_data(op, device, "code", code, torch.float32, INT8_LEVELS if code.numel() == INT8_LEVELS else LEVELS)


def check_weight(
    op, device, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size, experts=1
) -> None:
    """Of `experts` weights [N, K] the tensors are stacked, but for the codebooks."""
    if N < 0 or K < 0:
        refuse(op, f"N and K must not be negative, got {N} and {K}")
    if experts * (N * K + BLOCK_SIZES[-1]) >= 2**63:
        refuse(op, f"N and K must have a product within 63 bits, got {N} and {K}")
    check_block_size(op, block_size)
    blocks = -(-N * K // block_size)
    is_int8 = code.numel() == INT8_LEVELS
    check_data(op, device, "packed", packed, torch.uint8, (N * K if is_int8 else -(-N * K // 2)) * experts)
    check_code(op, device, code)
    scales = scales_of(absmax, scale_absmax, scale_code)
    if (scale_absmax is None) != (scale_offset is None) or (scale_absmax is not None and scale_code is None):
        refuse(op, "scale_absmax and scale_offset must be given together, and with scale_code")
    numbers = absmax.dtype if scales in ("bfloat16", "float16") else torch.float32
    check_data(op, device, "absmax", absmax, numbers if scale_code is None else torch.uint8, blocks * experts)
    if scale_code is not None:
        check_data(op, device, "scale_code", scale_code, torch.float32, 256 * (experts if scales == "codes" else 1))
    if scale_absmax is not None:
        check_data(op, device, "scale_absmax", scale_absmax, torch.float32, -(-blocks // SUPERBLOCK) * experts)
        check_data(op, device, "scale_offset", scale_offset, torch.float32, experts)


def check_offsets(op: str, device: torch.device, expert_offsets: Tensor) -> int:
    """Returns E."""
    if expert_offsets.dim() != 1:
        refuse(op, f"expert_offsets must have shape [E], got {list(expert_offsets.shape)}")
    experts = expert_offsets.shape[0]
    check_data(op, device, "expert_offsets", expert_offsets, torch.int32, experts)
    return experts


def check_rows(op: str, name: str, inputs: Tensor, depth_name: str, depth: int) -> None:
    """What rows of experts are multiplied: [T, depth] in any strides."""
    check_dtype(op, name, inputs.dtype)
    if inputs.dim() != 2 or inputs.shape[1] != depth:
        refuse(op, f"{name} must have shape [T, {depth_name}={depth}], got {list(inputs.shape)}")


def check_experts(
    op: str, inputs_name: str, inputs: Tensor, expert_offsets: Tensor, weight: WeightArgs, depth_name: str, depth: int
) -> None:
    """x of grouped_linear or dy of its gradient, [T, depth] in any strides, and the weight of E experts."""
    device = inputs.device
    check_rows(op, inputs_name, inputs, depth_name, depth)
    experts = check_offsets(op, device, expert_offsets)
    check_weight(op, device, *weight, experts)
    K, block_size = weight[7], weight[8]
    if K % expert_columns(block_size):
        refuse(op, f"K must be a multiple of {expert_columns(block_size)} at block_size={block_size}, got {K}")


def check_range(op: str, N: int, K: int, row_begin: int, row_end: int, col_begin: int, col_end: int) -> None:
    for name, begin, end, size in (("rows", row_begin, row_end, N), ("cols", col_begin, col_end, K)):
        if not 0 <= begin <= end <= size:
            refuse(op, f"{name} must be a range within 0..{size}, got {begin}..{end}")


def check_out(op: str, device: torch.device, out: Tensor, rows: int, cols: int) -> None:
    check_dtype(op, "out", out.dtype)
    check_device(op, "out", out, device)
    if out.shape != (rows, cols):
        refuse(op, f"out must have shape {[rows, cols]}, got {list(out.shape)}")
    if rows == 0 or cols == 0:
        return
    if cols > 1 and out.stride(1) != 1:
        refuse(op, "out must be contiguous in its last dimension")
    if rows > 1 and out.stride(0) < cols:
        refuse(op, "out's rows must not overlap")


def check_input(op: str, device: torch.device, name: str, tensor: Tensor, depth_name: str, depth: int) -> None:
    """x of linear or dy of linear_dgrad: [..., depth] in any strides."""
    check_dtype(op, name, tensor.dtype)
    check_device(op, name, tensor, device)
    if tensor.dim() == 0 or tensor.shape[-1] != depth:
        refuse(op, f"{name} must have {depth_name}={depth} columns, got shape {list(tensor.shape)}")


def check_lora_term(
    op: str, device: torch.device, names: tuple[str, str], lora_inner: Tensor | None, lora_factor: Tensor | None,
    rank_dim: int, dtype: torch.dtype, M: int, size: int, experts: int | None = None,
) -> None:  # fmt: skip
    """lora_inner is [M, rank]; dimension rank_dim of lora_factor is the rank, and the other one has `size` elements.

    In a grouped op lora_factor has one matrix for each of the experts, stacked.
    """
    inner_name, factor_name = names
    if (lora_inner is None) != (lora_factor is None):
        refuse(op, f"{inner_name} and {factor_name} must be given together")
    if lora_inner is None or lora_factor is None:
        return
    leading, matrix = list(lora_factor.shape[:-2]), lora_factor.shape[-2:]
    if leading != ([] if experts is None else [experts]) or len(matrix) != 2 or matrix[1 - rank_dim] != size:
        wanted = f"{size} {'rows' if rank_dim == 1 else 'columns'}"
        wanted = wanted if experts is None else f"{wanted} for each of {experts} experts"
        refuse(op, f"{factor_name} must have {wanted}, got shape {list(lora_factor.shape)}")
    rank = matrix[rank_dim]
    if lora_inner.dim() == 0 or lora_inner.shape[-1] != rank:
        came = list(lora_inner.shape)
        refuse(op, f"{inner_name} must have r={rank} columns as {factor_name} has, got shape {came}")
    check_data(op, device, inner_name, lora_inner, dtype, M * rank)
    check_data(op, device, factor_name, lora_factor, dtype, size * rank * (1 if experts is None else experts))


def check_quantize(weight: Tensor, code: Tensor, block_size: int) -> None:
    if weight.dim() != 2:
        refuse("quantize", f"weight must be 2-D [N, K], got shape {list(weight.shape)}")
    check_dtype("quantize", "weight", weight.dtype)
    check_code("quantize", weight.device, code)
    check_block_size("quantize", block_size)


def check_quantize_absmax(absmax: Tensor, scale_code: Tensor, scale_is_e4m3: bool) -> None:
    check_data("quantize_absmax", absmax.device, "absmax", absmax, torch.float32, absmax.numel())
    check_data("quantize_absmax", absmax.device, "scale_code", scale_code, torch.float32, 256)


def check_dequantize(
    packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size, row_begin, row_end, col_begin,
    col_end, dtype,
) -> None:  # fmt: skip
    weight = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    check_weight("dequantize", packed.device, *weight)
    check_range("dequantize", N, K, row_begin, row_end, col_begin, col_end)
    check_dtype("dequantize", "dtype", dtype)


def check_dequantize_out(
    packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size, row_begin, row_end, col_begin,
    col_end, out,
) -> None:  # fmt: skip
    weight = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    check_weight("dequantize", packed.device, *weight)
    check_range("dequantize", N, K, row_begin, row_end, col_begin, col_end)
    check_out("dequantize", packed.device, out, row_end - row_begin, col_end - col_begin)


def check_linear(
    x, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size, bias, lora_P=None, lora_B=None,
    scaling=1.0,
) -> None:  # fmt: skip
    device, M = x.device, x.shape[:-1].numel()
    check_weight("linear", device, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size)
    check_input("linear", device, "x", x, "K", K)
    if bias is not None:
        check_data("linear", device, "bias", bias, x.dtype, N)
    check_lora_term("linear", device, ("lora_P", "lora_B"), lora_P, lora_B, 1, x.dtype, M, N)


def check_linear_dgrad(
    dy, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size, lora_Q=None, lora_A=None,
    scaling=1.0,
) -> None:  # fmt: skip
    device, M, weight = dy.device, dy.shape[:-1].numel(), (packed, absmax, scale_absmax, scale_offset, code)
    check_weight("linear_dgrad", device, *weight, scale_code, N, K, block_size)
    check_input("linear_dgrad", device, "dy", dy, "N", N)
    check_lora_term("linear_dgrad", device, ("lora_Q", "lora_A"), lora_Q, lora_A, 0, dy.dtype, M, K)


def check_grouped_linear(
    x, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size, bias=None,
    lora_P=None, lora_B=None, scaling=1.0,
) -> None:  # fmt: skip
    weight, device = (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size), x.device
    check_experts("grouped_linear", "x", x, expert_offsets, weight, "K", K)
    E = expert_offsets.shape[0]
    if bias is not None:
        check_data("grouped_linear", device, "bias", bias, x.dtype, E * N)
    check_lora_term("grouped_linear", device, ("lora_P", "lora_B"), lora_P, lora_B, 1, x.dtype, x.shape[0], N, E)


def check_grouped_linear_dgrad(
    dy, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size, lora_Q=None,
    lora_A=None, scaling=1.0,
) -> None:  # fmt: skip
    weight, names = (
        (packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size),
        ("lora_Q", "lora_A"),
    )
    check_experts("grouped_linear_dgrad", "dy", dy, expert_offsets, weight, "N", N)
    T, E = dy.shape[0], expert_offsets.shape[0]
    check_lora_term("grouped_linear_dgrad", dy.device, names, lora_Q, lora_A, 0, dy.dtype, T, K, E)


def check_lora_grad(small: Tensor, wide: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False) -> None:
    if small.dim() == 0 or wide.dim() == 0:
        refuse("lora_grad", f"small and wide must have columns, got shapes {list(small.shape)} and {list(wide.shape)}")
    check_dtype("lora_grad", "wide", wide.dtype)
    check_dtype("lora_grad", "dtype", dtype)
    M = wide.shape[:-1].numel()
    check_data("lora_grad", wide.device, "small", small, wide.dtype, M * small.shape[-1])


def check_grouped_lora_inner(x: Tensor, expert_offsets: Tensor, lora_factor: Tensor, transposed: bool = False) -> None:
    op = "grouped_lora_inner"
    experts = check_offsets(op, x.device, expert_offsets)
    if lora_factor.dim() != 3 or lora_factor.shape[0] != experts:
        refuse(op, f"lora_factor must have a matrix for each of {experts} experts, got shape {list(lora_factor.shape)}")
    check_rows(op, "x", x, "D", lora_factor.shape[1 if transposed else 2])
    check_data(op, x.device, "lora_factor", lora_factor, x.dtype, lora_factor.numel())


def check_grouped_lora_grad(
    small: Tensor, wide: Tensor, expert_offsets: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False
) -> None:
    op = "grouped_lora_grad"
    if small.dim() != 2 or wide.dim() != 2:
        refuse(op, f"small and wide must be 2-D, got shapes {list(small.shape)} and {list(wide.shape)}")
    check_dtype(op, "wide", wide.dtype)
    check_dtype(op, "dtype", dtype)
    check_offsets(op, wide.device, expert_offsets)
    check_data(op, wide.device, "small", small, wide.dtype, wide.shape[0] * small.shape[1])


def check_sort_by_expert(x: Tensor, top_k_index: Tensor, num_experts: int) -> None:
    op = "sort_by_expert"
    check_dtype(op, "x", x.dtype)
    check_device(op, "top_k_index", top_k_index, x.device)
    if x.dim() != 2 or top_k_index.dim() != 2 or top_k_index.shape[0] != x.shape[0]:
        came = f"{list(x.shape)} and {list(top_k_index.shape)}"
        refuse(op, f"x and top_k_index must have shapes [T, H] and [T, k], got {came}")
    if top_k_index.dtype != torch.int64:
        refuse(op, f"top_k_index must be {torch.int64}, got {top_k_index.dtype}")
    if num_experts < 0:
        refuse(op, f"num_experts must not be negative, got {num_experts}")


def check_positions(op: str, name: str, tensor: Tensor, positions: Tensor, is_rows: bool) -> None:
    """rows [T * k, H] or tokens [T, H] in any strides, beside positions [T, k]."""
    check_dtype(op, name, tensor.dtype)
    check_device(op, "positions", positions, tensor.device)
    T = positions.shape.numel() if is_rows else positions.shape[0] if positions.dim() else 0
    if tensor.dim() != 2 or positions.dim() != 2 or tensor.shape[0] != T:
        expected = f"[{'T * k' if is_rows else 'T'}, H] and [T, k]"
        came = f"{list(tensor.shape)} and {list(positions.shape)}"
        refuse(op, f"{name} and positions must have shapes {expected}, got {came}")
    if positions.dtype != torch.int32:
        refuse(op, f"positions must be {torch.int32}, got {positions.dtype}")


def check_routing_weights(op: str, weights: Tensor | None, positions: Tensor) -> None:
    if weights is None:
        return
    check_dtype(op, "weights", weights.dtype)
    check_device(op, "weights", weights, positions.device)
    if weights.shape != positions.shape:
        refuse(op, f"weights must have shape {list(positions.shape)} as positions, got {list(weights.shape)}")


def check_combine_experts(rows: Tensor, positions: Tensor, weights: Tensor | None, dtype: torch.dtype) -> None:
    op = "combine_experts"
    check_positions(op, "rows", rows, positions, True)
    check_routing_weights(op, weights, positions)
    check_dtype(op, "dtype", dtype)


def check_combine_experts_dgrad(dout: Tensor, positions: Tensor, weights: Tensor | None, dtype: torch.dtype) -> None:
    op = "combine_experts_dgrad"
    check_positions(op, "dout", dout, positions, False)
    check_routing_weights(op, weights, positions)
    check_dtype(op, "dtype", dtype)


def check_combine_experts_wgrad(dout: Tensor, rows: Tensor, positions: Tensor, dtype: torch.dtype) -> None:
    op = "combine_experts_wgrad"
    check_positions(op, "dout", dout, positions, False)
    check_positions(op, "rows", rows, positions, True)
    if dout.shape[1] != rows.shape[1]:
        refuse(op, f"rows must have H={dout.shape[1]} columns as dout, got shape {list(rows.shape)}")
    check_dtype(op, "dtype", dtype)


CHECKS: dict[str, Callable[..., None]] = {
    "quantize": check_quantize,
    "quantize_absmax": check_quantize_absmax,
    "dequantize": check_dequantize,
    "dequantize_out": check_dequantize_out,
    "linear": check_linear,
    "linear_dgrad": check_linear_dgrad,
    "grouped_linear": check_grouped_linear,
    "grouped_linear_dgrad": check_grouped_linear_dgrad,
    "lora_grad": check_lora_grad,
    "grouped_lora_inner": check_grouped_lora_inner,
    "grouped_lora_grad": check_grouped_lora_grad,
    "sort_by_expert": check_sort_by_expert,
    "combine_experts": check_combine_experts,
    "combine_experts_dgrad": check_combine_experts_dgrad,
    "combine_experts_wgrad": check_combine_experts_wgrad,
}


def checked(op: str, function: Callable) -> Callable:
    """An op's function with its arguments checked first."""
    check = CHECKS[op]

    @functools.wraps(function)
    def run(*arguments, **keywords):
        check(*arguments, **keywords)
        return function(*arguments, **keywords)

    return run
