"""prune_structure: the heads, channels or blocks that a model misses least, cut out of it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...model.walk import inside
from ...modes import outside_inference_mode
from ..batches import Batch
from .structure import MULTIPLE, Structure, check_dense, check_structure, cut, kept_count, units_in
from .structure_scores import methods_of, scores_of_units

ROLES_OF = {"heads": ("q", "k", "v", "o"), "channels": ("up", "down"), "layers": ()}
CUT_OF = {"heads": ("q", "k", "v", "o"), "channels": ("gate", "up", "down"), "layers": ()}


@outside_inference_mode
def prune_structure(
    model: nn.Module,
    structure: Structure,
    unit: str,
    share: float,
    method: str = "magnitude",
    batches: Iterable[Batch] | None = None,
    multiple: int = MULTIPLE,
    progress: bool = True,
) -> list[Tensor]:
    """Cut the heads, MLP channels or whole blocks with the smallest scores out of a model, in place.

    The layers shrink, and so do a file of the model and what a product costs. Every block loses equally many heads or
    channels, those with its own smallest scores, since a configuration has one number for all. With grouped-query
    attention a kv head goes with all query heads that read it. A configuration that the model has is not known here
    and not changed; nor are the blocks' own numbers, by which some models keep a cache of keys and values.

    Args:
        model: dense, whole on its devices.
        structure: of `find_structure`, made before anything was pruned: shares are of its counts, so that a second
            call at the same share changes nothing.
        unit: "heads", "channels" or "layers".
        share: of the units to prune, in [0, 1). What stays is rounded to the nearest whole number, channels to a
            multiple of `multiple`, at least one.
        method: of heads and channels "magnitude", "wanda" or "gradient"; of layers "magnitude", "gradient",
            "influence" (1 - cosine of input and output, arXiv 2403.03853) or "kl" (without each in turn). See
            `scores_of_units`.
        batches: what all methods but magnitude run the model on; gradient's need labels or next tokens.
        multiple: 64 leaves rows of down whole numbers of blocks of 64, which a kernel needs for no row to share one.

    Returns:
        What stays, by the numbers that the units had: int64, ascending; one tensor a block, or one alone of layers.

    Raises:
        ValueError: an argument is wrong, the model is not as `structure` says, or a layer that would be cut is in 4
            bits (prune first, then quantize). The model is then unchanged.
    """
    who = "nf4kernels.recover.prune_structure"
    model = inside(model)
    count = kept_count(unit, share, structure, multiple, who)
    if method not in methods_of(unit):
        raise ValueError(f"{who}: method must be one of {', '.join(methods_of(unit))} for {unit}, got {method!r}")
    if method != "magnitude" and batches is None:
        raise ValueError(f"{who}: batches must be given for method={method!r}, got None")
    missing = [role for role in ROLES_OF[unit] if role not in structure.names]
    if missing:
        raise ValueError(f"{who}: structure must name the layers {', '.join(missing)} to prune {unit}, got none")
    check_structure(model, structure, who)
    check_dense(model, structure, CUT_OF[unit], who)
    present = units_in(model, structure, unit)
    lists = 1 if unit == "layers" else len(structure.stack_of(model))
    if count >= present:
        return [torch.arange(present) for _ in range(lists)]
    scores = scores_of_units(model, structure, unit, method, batches, progress)
    if not scores.isfinite().all():
        raise ValueError(f"{who}: scores must be finite, got {method} of {unit} that is not")
    kept = [each.argsort(descending=True, stable=True)[:count].sort().values for each in scores]
    cut(model, structure, unit, kept)
    return kept
