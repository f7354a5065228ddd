"""grouped_lora_inner: P[T, r] = rows of x[T, D] times their expert's lora_factor[e][r, D]^T, for E experts."""

from torch import Tensor

from ..arguments import check_grouped_lora_inner, refuse


def grouped_lora_inner(x: Tensor, expert_offsets: Tensor, lora_factor: Tensor, transposed: bool = False) -> Tensor:
    check_grouped_lora_inner(x, expert_offsets, lora_factor, transposed)
    refuse("grouped_lora_inner", "not in the Triton kernels yet")
