"""Fewer weights: zeros in layers, dense or in 4 bits; heads, channels and blocks cut out."""

from .masks import apply_masks
from .prune import find_masks, prune_model, share_of_zeros
from .retraining import MaskedLora, held, merge_pruned
from .schedule import prune_in_steps, pruning_schedule
from .shrink import prune_structure
from .structure import Structure, find_structure

__all__ = [
    "MaskedLora",
    "Structure",
    "apply_masks",
    "find_masks",
    "find_structure",
    "held",
    "merge_pruned",
    "prune_in_steps",
    "prune_model",
    "prune_structure",
    "pruning_schedule",
    "share_of_zeros",
]
