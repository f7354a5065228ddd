"""dequantize + GEMM for linear and linear_dgrad: a slice of Ŵ at a time in one workspace, times torch's matmul.

Who       dequantize.py fills the slice and the vendor's GEMM multiplies by it. A slice is rows of Ŵ for linear and
          columns of Ŵ for linear_dgrad, so that each slice gives whole columns of out.
Trick     the LoRA term is more of the contraction, [in | P] times [Ŵ | s B] or [in | Q] times [Ŵ ; s A], with zeros up
          to a multiple of 8, which the vendor's fast kernels want. The scaling goes to the factor: a Q of scaled
          losses has no room for it in fp16. Rejected: adding the term to out, which would be rounded twice and read
          and written again.
Bytes     2.516 a weight, most of them within the L2; never a 16-bit copy of the weight larger than SLICE_BYTES.
Needs     bf16 or fp16: true fp32 does not go through torch's matmul, for which a user may have allowed TF32.
"""

import torch
from torch import Tensor

from .decode import ceil_div
from .dequantize import launch

SLICE_BYTES = 24 << 20  # stays in the L2 of an A100 and later


def multiply_by_slices(
    dgrad: bool, inputs: Tensor, weight: tuple, bias: Tensor | None, lora_inner: Tensor | None,
    lora_factor: Tensor | None, scaling: float, out: Tensor,
) -> None:  # fmt: skip
    """out[M, columns] = inputs[M, depth] @ (Ŵ if dgrad else Ŵ^T) + the LoRA term + bias."""
    given = (inputs, bias, lora_inner, lora_factor)  # torch's product has no `out` for what requires a gradient
    inputs, bias, lora_inner, lora_factor = (each if each is None else each.detach() for each in given)
    (M, depth), columns = inputs.shape, out.shape[1]
    rank = 0 if lora_factor is None else lora_factor.shape[0 if dgrad else 1]
    extended_depth = depth + ceil_div(rank, 8) * 8
    if rank > 0:
        extended = inputs.new_zeros((M, extended_depth))
        extended[:, :depth] = inputs
        extended[:, depth : depth + rank] = lora_inner.view(M, rank)
        inputs, lora_factor = extended, lora_factor * scaling
    slices = max(ceil_div(columns * extended_depth * 2, SLICE_BYTES), 1)
    width = ceil_div(ceil_div(columns, slices), 128) * 128
    workspace = inputs.new_empty(min(width, columns) * extended_depth)
    for begin in range(0, columns, width):
        count = min(width, columns - begin)
        to = out[:, begin : begin + count]
        if dgrad:
            part = workspace[: count * extended_depth].view(extended_depth, count)
            launch(weight, 0, begin, part[:depth])
            if rank > 0:
                part[depth : depth + rank] = lora_factor[:, begin : begin + count]
                part[depth + rank :] = 0
            torch.mm(inputs, part, out=to)
            continue
        part = workspace[: count * extended_depth].view(count, extended_depth)
        launch(weight, begin, 0, part[:, :depth])
        if rank > 0:
            part[:, depth : depth + rank] = lora_factor[begin : begin + count]
            part[:, depth + rank :] = 0
        if bias is None:
            torch.mm(inputs, part.T, out=to)
        else:
            torch.addmm(bias[begin : begin + count], inputs, part.T, out=to)
