"""linear and linear_dgrad for many rows: a panel of Ŵ at a time, in memory that all panels share, times torch's matmul.

Who       dequantize.py fills the panel, the vendor's GEMM multiplies: rows of Ŵ for linear, columns for linear_dgrad,
          so that each panel gives whole columns of out.
Trick     LoRA's term is more of the contraction, [in | P] times [Ŵ | s B] or [in | Q] times [Ŵ ; s A], with zeros up
          to a multiple of 8, which the vendor's fast kernels want. The scaling goes to the weights: a Q of scaled
          losses has no room for it in fp16. Rejected: adding the term to out, which would be rounded twice and read
          and written again.
Bytes     2.516 a weight, most of them within the L2; never a 16-bit copy of the weight larger than PANEL_BYTES.
Needs     bf16 or fp16: true fp32 does not go through torch's matmul, which a user may have allowed TF32.
"""

import torch
from torch import Tensor

from .decode import ceil_div
from .dequantize import launch

PANEL_BYTES = 24 << 20  # stays in the L2 of an A100 and later


def multiply_panels(
    dgrad: bool, inputs: Tensor, weight: tuple, bias: Tensor | None, small: Tensor | None, factor: Tensor | None,
    scaling: float, out: Tensor,
) -> None:  # fmt: skip
    """out [M, columns] = inputs [M, depth] @ (Ŵ if dgrad else Ŵ^T), LoRA's term and bias."""
    (M, depth), columns = inputs.shape, out.shape[1]
    rank = 0 if factor is None else factor.shape[0 if dgrad else 1]
    width = depth + ceil_div(rank, 8) * 8
    if rank > 0:
        wide = inputs.new_zeros((M, width))
        wide[:, :depth] = inputs
        wide[:, depth : depth + rank] = small.view(M, rank)
        inputs, factor = wide, factor * scaling
    panels = max(ceil_div(columns * width * 2, PANEL_BYTES), 1)
    count = ceil_div(ceil_div(columns, panels), 128) * 128
    memory = inputs.new_empty(min(count, columns) * width)
    for begin in range(0, columns, count):
        size = min(count, columns - begin)
        to = out[:, begin : begin + size]
        if dgrad:
            panel = memory[: size * width].view(width, size)
            launch(weight, 0, begin, panel[:depth])
            if rank > 0:
                panel[depth : depth + rank] = factor[:, begin : begin + size]
                panel[depth + rank :] = 0
            torch.mm(inputs, panel, out=to)
            continue
        panel = memory[: size * width].view(size, width)
        launch(weight, begin, 0, panel[:, :depth])
        if rank > 0:
            panel[:, depth : depth + rank] = factor[begin : begin + size]
            panel[:, depth + rank :] = 0
        if bias is None:
            torch.mm(inputs, panel.T, out=to)
        else:
            torch.addmm(bias[begin : begin + size], inputs, panel.T, out=to)
