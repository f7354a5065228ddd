"""What every calibrated rounding has in common: the walk over the targets, and the choice of scales and levels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...codebook import FORMATS
from ...functional import dequantize, quantize
from ...model.targets import Target
from ...nn.lora import FROM_WEIGHT
from ...nn.quant_experts import QuantExperts
from ...nn.quant_linear import QuantLinear
from ...quantized_weight import INT8, QuantizedWeight
from ..batches import Batch
from .calibration import Calibration, Statistics
from .encoding import decoded_scales, nearest_codes, scale_of_each, with_codes
from .levels import fitted_levels
from .scales import searched_scales

SCALES = ("absmax", "search")
LEVELS = ("given", "kmeans")
ROUNDS = 3  # of levels and scales in turn


class CalibratedRounding:
    """A rounding for `quantize_model(rounding=)` that makes one weight's codes, scales and levels at a time.

    Fused experts, layers in 8 bits, and layers whose weight or batches say nothing (no rows reach them, a shape without
    elements, on meta), are rounded to the nearest level.

    Args:
        batches: calibration data as recover/batches.py has them, on the model's device; gone through several times.
            None: the weight alone decides.
        correct_bias: where a layer has a bias, add to it what the rounding takes from the mean output.
    """

    WHO = "nf4kernels.recover"

    def __init__(self, batches: Iterable[Batch] | None = None, correct_bias: bool = False) -> None:
        self.batches = None if batches is None else list(batches)
        self.correct_bias = correct_bias
        if self.batches is not None and not self.batches:
            raise ValueError(f"{self.WHO}: batches must hold at least one batch, got none")
        if correct_bias and self.batches is None:
            raise ValueError(f"{self.WHO}: correct_bias must go with batches, got none")

    def quantized(self, weight: Tensor, statistics: Statistics | None, options: dict[str, Any]) -> QuantizedWeight:
        """Of a weight `[N, K]`, by the options of `nf4kernels.quantize`."""
        raise NotImplementedError

    def enter_block(self, calibration: Calibration) -> None:
        """Called where a block's turn has come, before any of its layers is rounded."""

    @torch.no_grad()
    def layers(
        self, model: nn.Module, targets: Sequence[Target], progress: bool
    ) -> Iterator[tuple[Target, QuantLinear | QuantExperts]]:
        """As `nf4kernels.model.targets.Rounding` has it.

        Raises:
            ValueError: an adapter is to start from a weight's own error, or inputs are not finite.
        """
        for target in targets:
            if target.lora is not None and target.lora.init in FROM_WEIGHT:
                raise ValueError(
                    f"{self.WHO}: lora must start from 'default' or 'gaussian' with this rounding, got"
                    f" {target.lora.init!r}"
                )
        calibration = None if self.batches is None else Calibration(model, targets, self.batches)
        for target in targets:
            if calibration is not None and calibration.enter(target):
                self.enter_block(calibration)
            yield target, self._layer(target, target.dense(model), calibration)

    def _layer(self, target: Target, dense: nn.Module, calibration: Calibration | None) -> QuantLinear | QuantExperts:
        if not isinstance(dense, nn.Linear) or dense.weight.is_meta or not dense.weight.numel():
            return target.rounded(dense)
        if isinstance(codebook := target.options.get("codebook"), str) and codebook == INT8:
            return target.rounded(dense)
        statistics = None if calibration is None else calibration.of(target)
        if (statistics is not None and not statistics.rows) or not dense.weight.isfinite().all():
            return target.rounded(dense)
        return self._calibrated(target, dense, statistics).train(dense.training)

    def _calibrated(self, target: Target, dense: nn.Linear, statistics: Statistics | None) -> QuantLinear:
        """The layer of a finite weight that the data reach, or without data; the others are rounded to nearest."""
        options = dict(target.options)
        compute_dtype = options.pop("compute_dtype", None)
        qweight = self.quantized(dense.weight.detach(), statistics, options)
        bias: Any = dense.bias
        if self.correct_bias and bias is not None and statistics is not None:
            left = dense.weight.float() - dequantize(qweight, torch.float32)
            bias = nn.Parameter((bias.float() + left @ statistics.mean).to(bias.dtype), bias.requires_grad)
        return QuantLinear.from_quantized(qweight, bias, compute_dtype, target.lora)


def output_error(weight: Tensor, qweight: QuantizedWeight, statistics: Statistics | None) -> float:
    """tr(E H E^T) of E = W - Ŵ, the mean squared error of an output row's sum; |E|^2 without statistics."""
    error = weight.float() - dequantize(qweight, torch.float32)
    if statistics is None:
        return error.square().sum(dtype=torch.float64).item()
    return ((error @ statistics.hessian) * error).sum(dtype=torch.float64).item()


def not_worse(
    weight: Tensor, found: QuantizedWeight, plain: QuantizedWeight, statistics: Statistics | None
) -> QuantizedWeight:
    """`found`, or `plain` where that has the smaller error on the calibration data."""
    errors = [output_error(weight, each, statistics) for each in (found, plain)]
    return found if errors[0] <= errors[1] else plain


def nearest(weight: Tensor, qweight: QuantizedWeight) -> QuantizedWeight:
    """The nearest codes at the decoded scales of `qweight`, which `quantize` chose before it rounded the scales."""
    scales = scale_of_each(decoded_scales(qweight), qweight.shape, qweight.block_size)
    return with_codes(qweight, nearest_codes(weight.float(), scales, qweight.code))


def chosen(
    weight: Tensor, statistics: Statistics | None, options: dict[str, Any], scales: str, levels: str, who: str
) -> QuantizedWeight:
    """The weight with nearest codes at those scales and levels: `quantize`'s, or refined by calibration."""
    qweight = nearest(weight, quantize(weight, **options))
    importance = None if statistics is None else statistics.hessian.diagonal()
    if levels == "kmeans":
        if qweight.codebook in FORMATS:
            raise ValueError(f"{who}: levels must be 'given' with codebook={qweight.codebook!r}, got 'kmeans'")
        for _ in range(ROUNDS):
            each = scale_of_each(decoded_scales(qweight), qweight.shape, qweight.block_size)
            code = fitted_levels(weight.float(), each, qweight.code, importance)
            qweight = nearest(weight, replace(qweight, code=code, codebook="custom"))
            if scales == "search":
                qweight = searched_scales(weight, qweight, importance)
        return qweight
    return searched_scales(weight, qweight, importance) if scales == "search" else qweight


def check_choice(value: Any, choices: Sequence[str], argument: str, who: str) -> None:
    if value not in choices:
        raise ValueError(f"{who}: {argument} must be one of {', '.join(choices)}, got {value!r}")


class ScaleSearch(CalibratedRounding):
    """Each block's scale searched for the least error of its weights, weighted by how large their inputs are.

    With `levels="kmeans"` each layer gets a codebook of its own as well, by weighted k-means.

    Args:
        batches, correct_bias: as in `CalibratedRounding`.
        scales: "search", or "absmax" as `nf4kernels.quantize` chooses them.
        levels: "given", those of the codebook that `quantize_model` is given, or "kmeans".
    """

    WHO = "nf4kernels.recover.ScaleSearch"

    def __init__(
        self,
        batches: Iterable[Batch] | None = None,
        scales: str = "search",
        levels: str = "given",
        correct_bias: bool = False,
    ) -> None:
        super().__init__(batches, correct_bias)
        check_choice(scales, SCALES, "scales", self.WHO)
        check_choice(levels, LEVELS, "levels", self.WHO)
        self.scales, self.levels = scales, levels

    def quantized(self, weight: Tensor, statistics: Statistics | None, options: dict[str, Any]) -> QuantizedWeight:
        found = chosen(weight, statistics, options, self.scales, self.levels, self.WHO)
        return not_worse(weight, found, quantize(weight, **options), statistics)
