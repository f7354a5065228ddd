"""grouped_lora_grad: out[e][r, C] = scaling * small[rows of e]^T @ wide[rows of e], or its transpose, for E experts."""

import torch
from torch import Tensor

from ..arguments import check_grouped_lora_grad, refuse


def grouped_lora_grad(
    small: Tensor, wide: Tensor, expert_offsets: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False
) -> Tensor:
    check_grouped_lora_grad(small, wide, expert_offsets, scaling, dtype, transposed)
    refuse("grouped_lora_grad", "not in the Triton kernels yet")
