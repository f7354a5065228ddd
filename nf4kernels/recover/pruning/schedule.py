"""Pruning in steps, with retraining between them."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Pruned = TypeVar("Pruned")
KINDS = ("cubic", "linear")


def pruning_schedule(final: float, steps: int, start: float = 0.0, kind: str = "cubic") -> list[float]:
    """The share that is pruned after each of `steps` steps, the last of which is `final`.

    cubic: final + (start - final) * (1 - t / steps)^3 for t = 1..steps: much while there is much to lose nothing by.

    Raises:
        ValueError: an argument is out of its range.

    Source: To prune, or not to prune (arXiv 1710.01878), equation 1.
    """
    who = "nf4kernels.recover.pruning_schedule"
    if not 0 <= start <= final < 1:
        raise ValueError(f"{who}: start and final must be 0 <= start <= final < 1, got {start} and {final}")
    if steps < 1:
        raise ValueError(f"{who}: steps must be at least 1, got {steps}")
    if kind not in KINDS:
        raise ValueError(f"{who}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    power = 3 if kind == "cubic" else 1
    return [final + (start - final) * (1 - t / steps) ** power for t in range(1, steps + 1)]


def prune_in_steps(
    model: nn.Module,
    prune: Callable[[nn.Module, float], Pruned],
    final: float,
    steps: int,
    retrain: Callable[[nn.Module, int, Pruned], object] | None = None,
    kind: str = "cubic",
) -> list[Pruned]:
    """`prune(model, share)` for each share of the schedule, and `retrain(model, step, pruned)` after each, from 0 on.

    What is pruned stays so as long as `retrain` leaves it so: `MaskedLora` and `held` do of masks, and what is cut out
    of a structure is gone. Scores are taken anew at each step, of the model as retraining left it.

    Returns:
        What `prune` returned, step by step.
    """
    results = []
    for step, share in enumerate(pruning_schedule(final, steps, kind=kind)):
        results.append(prune(model, share))
        if retrain is not None:
            retrain(model, step, results[-1])
    return results
