"""One codebook of 16 levels for many layers, fitted to their weights where NF4 is fitted to a normal distribution."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..codebook import CODEBOOKS
from ..model.heads import SKIP
from ..model.plan import check_skip, plan_layers
from ..model.walk import get_submodule, inside
from ..quantized_weight import check_block_size
from .roundings.line_kmeans import line_kmeans

BINS = 1 << 14  # of [-1, 1]; a bin is 1/650 of the smallest step of NF4
ITERATIONS = 200


@torch.no_grad()
def fit_codebook(
    weights: Iterable[Tensor],
    importance: Iterable[Tensor] | None = None,
    block_size: int = 64,
    iterations: int = ITERATIONS,
) -> Tensor:
    """16 ascending levels in [-1, 1], fp32, for `quantize_model(codebook=)`, by weighted k-means on a line.

    What is least is the sum over all weights of importance * (w - Ŵ)^2 with exact block scales: k-means over
    w / absmax, weighted by importance * absmax^2. Lloyd's iterations begin at the best levels of a coarse histogram, so
    that no poor local minimum is the end, or at NF4's where those are better.

    Args:
        weights: `[N, K]` each; one is in fp32 at a time.
        importance: one for each weight, that broadcasts against it, as the mean square of each input, `[K]`.
        block_size: that of the quantization.

    Raises:
        ValueError: block_size is none, no weight is other than zero, or importance has another length.
    """
    who = "nf4kernels.recover.fit_codebook"
    check_block_size(block_size, who)
    counts = torch.zeros(BINS, dtype=torch.float64)
    sums = torch.zeros(BINS, dtype=torch.float64)
    given = None if importance is None else iter(importance)
    for weight in weights:
        each = None if given is None else next(given, None)
        if given is not None and each is None:
            raise ValueError(f"{who}: importance must have one for each weight, got fewer")
        values, mass = _normalised(weight.detach(), each, block_size)
        index = ((values + 1) * (BINS / 2)).long().clamp_(0, BINS - 1).cpu()
        mass = mass.double().cpu()
        counts.index_add_(0, index, mass)
        sums.index_add_(0, index, mass * values.double().cpu())
    if given is not None and next(given, None) is not None:
        raise ValueError(f"{who}: importance must have one for each weight, got more")
    if not counts.isfinite().all() or not sums.isfinite().all():
        raise ValueError(f"{who}: weights and importance must be finite, got NaN or inf")
    if not counts.sum() > 0:
        raise ValueError(f"{who}: weights must hold a weight other than zero, got none")
    return line_kmeans(counts, sums, CODEBOOKS["nf4"], iterations)


def shared_codebook(model: nn.Module, skip: Iterable[str] = (), block_size: int = 64) -> Tensor:
    """`fit_codebook` of every nn.Linear that `quantize_model(model, skip)` would replace."""
    model, skip = inside(model), tuple(skip)
    check_skip(model, skip, "nf4kernels.recover.shared_codebook")
    dense = [get_submodule(model, names[0]) for names in plan_layers(model, (*SKIP, *skip), block_size)[0]]
    return fit_codebook((layer.weight for layer in dense if isinstance(layer, nn.Linear)), block_size=block_size)


def _normalised(weight: Tensor, importance: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """(w / absmax, importance * absmax^2) of each weight outside blocks of zeros, flat, fp32."""
    flat = weight.reshape(-1).float()
    padding = -flat.numel() % block_size
    absmax = nn.functional.pad(flat, (0, padding)).view(-1, block_size).abs().amax(1)
    absmax = absmax.repeat_interleave(block_size)[: flat.numel()]
    mass = absmax.square()
    if importance is not None:
        mass = mass * importance.to(flat).expand(weight.shape).reshape(-1)
    kept = absmax != 0  # NaN is not 0, and shows in the sums
    return (flat[kept] / absmax[kept]).clamp_(-1, 1), mass[kept]
