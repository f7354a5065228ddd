"""A LoRA adapter that starts from the rounding error, weighted by what the data say of it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import dequantize
from ...model.targets import Target
from ...nn.lora import LoraConfig, principal_factors
from ...nn.quant_experts import QuantExperts
from ...nn.quant_linear import QuantLinear
from ...quantized_weight import QuantizedWeight
from ..agreement import evaluating
from ..batches import Batch, cross_entropy
from .calibration import Statistics
from .rounding import CalibratedRounding, ScaleSearch, check_choice

WEIGHTINGS = ("hessian", "activation", "fisher")
DAMPING = 0.01


class LqLora(CalibratedRounding):
    """Ŵ + scaling * B @ A close to W by alternation: Ŵ rounds what the product leaves, the product takes the error.

    The error that the product minimizes is weighted: by the whole Hessian of the inputs ("hessian", so that it is the
    mean squared error of the outputs), by its diagonal ("activation"), or by rows and columns as the squared gradients
    of the loss have them ("fisher", LQ-LoRA's own). The best of the alternation is kept. Every layer needs an adapter
    (`quantize_model(lora=)`), which then counts as one with `init="loftq"`: `save_adapters` writes it over the original
    weight, at twice the rank.

    Args:
        batches: as in `CalibratedRounding`; for "fisher" they need labels, or a causal model.
        weighting: one of the three.
        iterations: of the alternation.
        then: how what the product leaves is rounded, such as `Gptq()`, on the same data; None is to the nearest level.

    Source: LQ-LoRA (arXiv 2311.12023), algorithms 1 and 2; LoftQ (arXiv 2310.08659), which has no weights.
    """

    WHO = "nf4kernels.recover.LqLora"

    def __init__(
        self,
        batches: Iterable[Batch],
        weighting: str = "hessian",
        iterations: int = 5,
        then: CalibratedRounding | None = None,
    ) -> None:
        super().__init__(batches)
        check_choice(weighting, WEIGHTINGS, "weighting", self.WHO)
        if iterations < 1:
            raise ValueError(f"{self.WHO}: iterations must be at least 1, got {iterations}")
        self.weighting, self.iterations = weighting, iterations
        self.then = ScaleSearch(scales="absmax") if then is None else then
        self._fisher: dict[str, tuple[Tensor, Tensor]] = {}

    def layers(
        self, model: nn.Module, targets: Sequence[Target], progress: bool
    ) -> Iterator[tuple[Target, QuantLinear | QuantExperts]]:
        for target in targets:
            if target.lora is None:
                raise ValueError(f"{self.WHO}: lora must be given for every layer, got None for {target.name}")
        if self.weighting == "fisher":
            self._fisher = squared_gradients(model, targets, self.batches or ())
        yield from super().layers(model, targets, progress)

    def _calibrated(self, target: Target, dense: nn.Linear, statistics: Statistics | None) -> QuantLinear:
        assert statistics is not None
        assert target.lora is not None
        config = replace(target.lora, init="loftq")
        options = dict(target.options)
        compute_dtype = options.pop("compute_dtype", None)
        dtype = dense.weight.dtype if dense.bias is None else dense.bias.dtype
        qweight, A, B = self._alternated(target.name, dense.weight.detach(), statistics, config, dtype, options)
        layer = QuantLinear.from_quantized(qweight, dense.bias, compute_dtype)
        layer.attach_lora(config, dtype)
        layer.set_start(A, B)
        return layer

    def _alternated(
        self, name: str, weight: Tensor, statistics: Statistics, config: LoraConfig, dtype: torch.dtype,
        options: dict[str, Any],
    ) -> tuple[QuantizedWeight, Tensor, Tensor]:  # fmt: skip
        W = weight.float()
        rows, columns = self._weights(name, statistics)
        best: Any = None
        A = B = None
        for _ in range(self.iterations):
            left = W if A is None or B is None else torch.addmm(W, B.float(), A.float(), alpha=-config.scaling)
            qweight = self.then.quantized(left.to(weight.dtype), statistics, options)
            error = W - dequantize(qweight, torch.float32)
            A, B = weighted_factors(error, rows, columns, config, dtype)
            found = weighted_error(torch.addmm(error, B.float(), A.float(), alpha=-config.scaling), rows, columns)
            if best is None or found < best[0]:
                best = found, qweight, A, B
        return best[1:]

    def _weights(self, name: str, statistics: Statistics) -> tuple[Tensor | None, Tensor]:
        if self.weighting == "fisher" and name in self._fisher:
            return self._fisher[name]
        hessian = statistics.hessian.clone()
        diagonal = hessian.diagonal()
        diagonal += DAMPING * diagonal.mean().clamp(min=1e-30)
        return None, hessian if self.weighting == "hessian" else hessian.diagonal()


def weighted_factors(
    error: Tensor, rows: Tensor | None, columns: Tensor, config: LoraConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A, B) of rank r with the least |R (E - scaling * B @ A) C| of diagonal R^2 = rows and C C^T = columns.

    By the singular values of R E C, from which R and C are then taken away again.

    Args:
        error: fp32 `[N, K]`.
        rows: fp32 `[N]`, above 0, or None for ones.
        columns: fp32 `[K]`, above 0: a diagonal; or `[K, K]`, positive definite.
    """
    if columns.dim() == 1:
        roots = columns.sqrt()
        scaled = error * roots
    else:
        roots = torch.linalg.cholesky(columns.double()).float()
        scaled = error @ roots
    row_roots = None if rows is None else rows.sqrt()[:, None]
    A, B = principal_factors(scaled if row_roots is None else scaled * row_roots, config, torch.float32)
    A = A / roots if columns.dim() == 1 else torch.linalg.solve_triangular(roots, A, upper=False, left=False)
    B = B if row_roots is None else B / row_roots
    return A.to(dtype).contiguous(), B.to(dtype).contiguous()


def weighted_error(error: Tensor, rows: Tensor | None, columns: Tensor) -> float:
    """|R E C|^2, as in `weighted_factors`; summed in fp64."""
    product = error * columns if columns.dim() == 1 else error @ columns
    each = (product * error).sum(1, dtype=torch.float64)
    return (each if rows is None else each * rows).sum().item()


def squared_gradients(
    model: nn.Module, layers: Sequence[Target], batches: Iterable[Batch]
) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (rows `[N]`, columns `[K]`): the means of a weight's squared gradients of a batch's loss, fp32.

    One weight's gradient is there at a time, beside what the backward itself keeps. Each pair has a mean of 1 and is
    at least DAMPING.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = []

    def adder(name: str):
        def add(parameter: Tensor) -> None:
            squares = parameter.grad.float().square()  # type: ignore[union-attr]  # it was just accumulated
            parameter.grad = None
            rows, columns = sums.setdefault(name, (torch.zeros_like(squares[:, 0]), torch.zeros_like(squares[0])))
            rows += squares.mean(1)
            columns += squares.mean(0)

        return add

    kept = {parameter: parameter.grad for parameter in wanted}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for target in layers:
            dense = target.dense(model)
            if isinstance(dense, nn.Linear):
                dense.weight.grad = None
                dense.weight.requires_grad_(True)
                handles.append(dense.weight.register_post_accumulate_grad_hook(adder(target.name)))
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                cross_entropy(model, batch, "nf4kernels.recover.LqLora").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, has_gradient in wanted.items():
            parameter.requires_grad_(has_gradient)
            parameter.grad = kept[parameter]
    return {
        name: tuple((each / each.mean().clamp(min=1e-30)).clamp(min=DAMPING) for each in pair)  # type: ignore[misc]
        for name, pair in sums.items()
    }
