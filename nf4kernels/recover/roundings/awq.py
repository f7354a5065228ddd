"""Activation-aware scaling: the columns that large inputs meet are made larger before they are rounded."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import dequantize, quantize
from ...quantized_weight import QuantizedWeight
from ..batches import Batch
from .calibration import Calibration, Statistics
from .folding import Fold, difference, find_folds, given_fold, outputs, unchanged
from .rounding import CalibratedRounding, ScaleSearch

GRID = 20  # of exponents from 0 on, below 1


class Awq(CalibratedRounding):
    """W diag(s) is rounded in place of W, and 1/s is folded into what makes W's input, before any layer of a block is.

    s = mean|x|^a, a of a grid by the least mean squared error of the outputs under the rounding that `quantize` is. The
    dense parameters of the model (norms, and the layers whose outputs are divided) change with it; what the dense model
    computes does not, up to their rounding. Inputs that no fold is found for (`folding.find_folds`) keep s = 1.

    Args:
        batches, correct_bias: as in `CalibratedRounding`.
        then: the rounding of the scaled weights, such as `ScaleSearch()` or `Gptq()`, on the same data. None rounds to
            the nearest level.
        folds: (name of the producer, names of the consumers) in place of those that are found; each is tried, and one
            that changes what the model computes is a ValueError.

    Source: AWQ (arXiv 2306.00978), sections 3.2 and 3.3, with the error of the output by the second moments of x.
    """

    WHO = "nf4kernels.recover.Awq"

    def __init__(
        self,
        batches: Iterable[Batch],
        then: CalibratedRounding | None = None,
        folds: Sequence[tuple[str, Sequence[str]]] | None = None,
        correct_bias: bool = False,
    ) -> None:
        super().__init__(batches, correct_bias)
        self.then = ScaleSearch(scales="absmax") if then is None else then
        self.folds = folds
        self.folded: list[tuple[str, ...]] = []  # names of producer and consumers, for whoever wants to know

    def quantized(self, weight: Tensor, statistics: Statistics | None, options: dict[str, Any]) -> QuantizedWeight:
        return self.then.quantized(weight, statistics, options)

    def enter_block(self, calibration: Calibration) -> None:
        targets = {id(t.dense(calibration.model)): t for group in calibration.groups() for t in group}
        folds = []
        for fold in self._folds(calibration):
            consumers = [targets[id(module)] for module in fold.consumers if id(module) in targets]
            if consumers:
                folds.append((fold, consumers))
        found = calibration.gather([consumers for _, consumers in folds])
        for fold, consumers in folds:
            statistics = found[consumers[0].name]
            if not statistics.rows:
                continue
            scale = best_scale([(t.dense(calibration.model), t.options) for t in consumers], statistics)
            if scale is not None and _folded(calibration, fold, scale):
                self.folded.append(fold.names)

    def _folds(self, calibration: Calibration) -> list[Fold]:
        block = calibration.block
        if self.folds is None:
            return find_folds(calibration, block)
        here = {t.name for group in calibration.groups() for t in group}
        return [given_fold(calibration, name, names) for name, names in self.folds if here & set(names)]


def best_scale(layers: Sequence[tuple[nn.Linear, Any]], statistics: Statistics) -> Tensor | None:
    """fp32 `[K]`, mean|x|^a over the root of its extremes' product, for layers that read the same x; None for a = 0.

    Layers come with their options of `nf4kernels.quantize`.
    """
    best, chosen = None, None
    size = statistics.mean_abs.clamp(min=1e-4 * float(statistics.mean_abs.max()) + 1e-30)
    for step in range(GRID):
        scale = size ** (step / GRID)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for dense, options in layers:
            kept = {name: value for name, value in options.items() if name != "compute_dtype"}
            weight = dense.weight.detach().float()
            qweight = quantize((weight * scale).to(dense.weight.dtype), **kept)
            left = dequantize(qweight, torch.float32) / scale - weight
            error += ((left @ statistics.hessian) * left).sum(dtype=torch.float64).item()
        if best is None or error < best:
            best, chosen = error, scale if step else None
    return chosen


def _folded(calibration: Calibration, fold: Fold, scale: Tensor) -> bool:
    """Whether the fold was applied: not where the block's output moved by more than its dtype's rounding."""
    with unchanged(fold) as parameters:
        before = outputs(calibration)
        fold.apply(scale)
        allowed = max(4 * torch.finfo(fold.consumers[0].weight.dtype).eps, 1e-5)
        if difference(outputs(calibration), before) > allowed:
            return False
        parameters.keep()
        return True
