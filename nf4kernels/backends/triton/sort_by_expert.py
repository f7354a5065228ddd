"""sort_by_expert: rows of x sorted by the expert that each of a token's choices names, and where each choice went.

The order is torch's: its stable sort waits for nothing, and takes a few launches, which a counting sort in Triton would
take as well. The rows are copied by combine_experts' kernel.
"""

from torch import Tensor

from ...reference import expert_positions
from ..arguments import check_sort_by_expert
from .combine_experts import combine_experts_dgrad


def sort_by_expert(x: Tensor, top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    check_sort_by_expert(x, top_k_index, num_experts)
    expert_offsets, positions = expert_positions(top_k_index, num_experts)
    return combine_experts_dgrad(x, positions, None, x.dtype), expert_offsets, positions
