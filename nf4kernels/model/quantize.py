"""quantize_model: from nn.Linear to QuantLinear and from experts to QuantExperts, all through a model."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..functional import dequantize
from ..modes import outside_inference_mode
from ..nn.experts_layout import dense_weights
from ..nn.lora import FROM_WEIGHT, LoraConfig
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import QuantLinear
from ..nn.released import check_gathered
from ..quantized_weight import WEIGHT_DTYPES, QuantizedExperts, QuantizedWeight
from .dispatched import check_not_dispatched
from .heads import SKIP
from .memory import model_bytes
from .plan import check_container, check_skip, parts, plan_layers, replace_module
from .report import QuantizedLayer, QuantizeReport, SkippedLayer
from .sharded import check_whole
from .targets import PlannedOptions, Rounding, Target, merged, planned
from .walk import get_submodule, inside

SLICES = 8  # in which a weight's error is measured: fp32 Ŵ then takes a quarter of a bf16 weight's bytes
SMALLEST_SLICE = 1 << 20  # elements


@outside_inference_mode
def quantize_model(
    model: nn.Module,
    skip: Iterable[str] = (),
    lora: LoraConfig | None = None,
    progress: bool = True,
    rounding: Rounding | None = None,
    plan: Mapping[str, PlannedOptions | None] | None = None,
    **quant_options,
) -> QuantizeReport:
    """Replace every nn.Linear of `model` by a QuantLinear, and fused 3-D experts by QuantExperts, in place.

    Left alone, each with its reason in the report: heads (the output layer and what a task's class adds to its model,
    and by name lm_head, embed_out, router, gate, score and classifier), what PEFT trains, what `skip` names, layers
    whose weight the model's own code reads, subclasses of nn.Linear, tied and parametrized weights, adapters, experts
    of a layout that QuantExperts does not take, and every other matrix (embeddings, Conv1D, sparse tensors). Layers in
    4 bits stay as they are, so a second call changes nothing. Training modes, hooks, biases and every `requires_grad`
    but the experts' are kept; a module registered under two names is replaced under both, and one that torch.compile
    made stays compiled.

    Weights are quantized one by one on their device and freed as it goes: the extra memory at the peak is about the
    bytes of the largest one. Every weight is checked for NaN and inf before the first one is replaced.

    Args:
        model: any module that contains layers, on the meta device too, not sharded yet.
        skip: further layers to leave alone: names of layers or of modules around them, in full or a run of whole
            components ("k_proj", "layers.0.mlp"), or fnmatch patterns over the full name ("*.0.*"). Experts are
            skipped together, by their name or that of one of their weights.
        lora: an adapter for every replaced nn.Linear, and for each expert of both weights of QuantExperts.
        progress: show a progress bar on stderr.
        rounding: how weights find their levels, as `nf4kernels.recover` has them; None is each weight's nearest level.
        plan: for layers by name the options that are not as for all, `lora` among them; None leaves the layer dense.
            Layers that it does not name are as all; a codebook that it names has its own block size, unless said.
        quant_options: codebook, block_size, double_quant, scale_codebook, nonfinite as in `nf4kernels.quantize`;
            compute_dtype as in `QuantLinear`.

    Returns:
        What was replaced, with bytes and relative RMS errors, and what was not.

    Raises:
        TypeError, ValueError: an argument is wrong, an entry of `skip` or `plan` matches nothing, `lora` is given and
            no layer is replaced, or a layer's weight is not float32, bfloat16 or float16 or not finite (the message
            names the layer); the model is then unchanged.
        RuntimeError: quantizing a layer failed for another reason (out of memory); the layers before it are replaced,
            that one and those after it are not, and another call goes on from there.
    """
    who = "nf4kernels.quantize_model"
    model = inside(model)
    patterns = _check_arguments(model, skip, lora, quant_options, who)
    plan = _checked_plan(plan, lora, quant_options, who)
    check_not_dispatched(model, who)
    check_whole(model, who, "quantize it, on the meta device too, then fully_shard it, then load_checkpoint")
    found, skipped = plan_layers(model, (*SKIP, *patterns), quant_options.get("block_size"))
    targets, left_dense = planned(found, lora, quant_options, plan, who)
    for names in left_dense:
        for name, weight in _weights(get_submodule(model, names[0]), names[0]):
            skipped.append(SkippedLayer(name, tuple(weight.shape), weight.nbytes, "the plan leaves it dense"))
    if lora is not None and not targets:
        raise ValueError(f"{who}: lora must have a layer to go on, got {_reasons(skipped) or 'no layer'}")
    for target in targets:
        for name, weight in _weights(target.dense(model), target.name):
            _check_dtype(name, weight, who)
            check_gathered([(f"the weight of {name}", weight)], who)
            if target.options.get("nonfinite", "raise") == "raise":
                _check_finite(name, weight, who)

    before = model_bytes(model)
    layers = []
    made = (rounding or _Nearest()).layers(model, targets, progress)
    with tqdm(total=len(targets), desc="quantize", unit="layer", disable=not progress) as bar:
        for expected in targets:
            try:
                target, layer = next(made)
                layers += _replaced(model, target, layer)
            except Exception as error:
                name = expected.name
                raise RuntimeError(f"{who}: layer {name} failed, those before it are replaced: {error}") from error
            bar.update()
    return QuantizeReport(layers, skipped, before, model_bytes(model))


def _check_arguments(model, skip, lora, quant_options, who: str) -> tuple[str, ...]:
    check_container(model, "model", who)
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"{who}: skip must be a sequence of names, got {skip!r}")
    skip = tuple(skip)
    if not all(isinstance(entry, str) for entry in skip):
        raise TypeError(f"{who}: skip must be a sequence of names, got {skip!r}")
    check_skip(model, skip, who)
    if lora is not None and not isinstance(lora, LoraConfig):
        raise TypeError(f"{who}: lora must be a LoraConfig or None, got {type(lora).__name__}")
    check_options(lora, quant_options, who)
    return skip


def check_options(lora: LoraConfig | None, quant_options: Mapping[str, Any], who: str) -> None:
    """TypeError or ValueError for what `QuantLinear.from_linear` would not take of a layer."""
    try:  # on meta every option is checked and nothing is computed
        QuantLinear.from_linear(nn.Linear(1, 1, device="meta"), lora, **quant_options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}: {error}") from None


def _checked_plan(plan, lora, quant_options, who: str) -> Mapping[str, PlannedOptions | None]:
    if plan is None:
        return {}
    if not isinstance(plan, Mapping):
        raise TypeError(f"{who}: plan must be a mapping from names of layers, got {type(plan).__name__}")
    for name, options in plan.items():
        if options is not None:
            chosen = merged({"lora": lora, **quant_options}, options)
            check_options(chosen.pop("lora"), chosen, f"{who}: plan: {name}")
    return plan


def _reasons(skipped: list[SkippedLayer]) -> str:
    """How many matrices were left alone for which reason, and the first of each by name."""
    counts, first = Counter(entry.reason for entry in skipped), {entry.reason: entry.name for entry in skipped[::-1]}
    return "; ".join(f"{count} that stay as they are ({first[reason]}, ...): {reason}"
                     for reason, count in counts.items())  # fmt: skip


def _weights(module: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    """(name, dense weight) of an nn.Linear or of experts, each with the name that messages and reports use.

    [N, K] or [E, N, K], also where the module has its transpose.
    """
    if isinstance(module, nn.Linear):
        return [(name, module.weight)]
    return [(f"{name}.{leaf}", weight) for leaf, weight in dense_weights(module).items()]


def _check_dtype(name: str, weight: Tensor, who: str) -> None:
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: the weight of {name} must be float32, bfloat16 or float16, got {weight.dtype}")


def _check_finite(name: str, weight: Tensor, who: str) -> None:
    if weight.is_meta or not weight.numel() or all(bound.isfinite() for bound in weight.detach().aminmax()):
        return
    index = tuple((~weight.isfinite()).nonzero()[0].tolist())
    where = ", ".join(f"{axis} {i}" for axis, i in zip(("expert", "row", "column")[-len(index) :], index))
    raise ValueError(f"{who}: the weight of {name} must be finite, got {weight[index].item()} at {where}")


class _Nearest:
    """The Rounding that quantize itself is."""

    def layers(self, model, targets, progress):
        for target in targets:
            yield target, target.rounded(target.dense(model))


def _replaced(model: nn.Module, target: Target, layer: QuantLinear | QuantExperts) -> list[QuantizedLayer]:
    """The weights of `layer`, which is now in the target's place, with their errors."""
    dense = target.dense(model)
    layers = []
    for part, (name, weight) in zip(parts(layer), _weights(dense, target.name)):
        start = _start(part)
        errors = (math.nan, math.nan) if weight.is_meta else squared_error(part.qweight, weight.detach(), start)
        layers.append(QuantizedLayer(name, tuple(weight.shape), weight.nbytes, part.nbytes, *errors))
    replace_module(model, target.names, dense, layer)
    return layers


def _start(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scaling) of an adapter that holds a part of the weight from its start on."""
    config: LoraConfig | None = getattr(layer, "lora", None)
    if config is None or config.init not in FROM_WEIGHT:
        return None
    return layer.lora_A.start, layer.lora_B.start, config.scaling


def squared_error(
    qweight: QuantizedWeight | QuantizedExperts, weight: Tensor, start: tuple[Tensor, Tensor, float] | None = None
) -> tuple[float, float]:
    """(|Ŵ - W|², |W|²), the differences in fp32, summed in fp64, a slice of rows at a time.

    With `start` = (A, B, scaling), Ŵ + scaling * B @ A takes the place of Ŵ.
    """
    if isinstance(qweight, QuantizedExperts):
        starts = [None] * len(qweight) if start is None else [(A, B, start[2]) for A, B in zip(*start[:2])]
        errors, totals = zip(*map(squared_error, qweight, weight, starts))
        return sum(errors), sum(totals)
    N, K = weight.shape
    rows = max(-(-N // SLICES), SMALLEST_SLICE // max(K, 1), 1)
    error = total = 0.0
    for begin in range(0, N, rows):
        part = weight[begin : begin + rows]
        decoded = dequantize(qweight, torch.float32, rows=(begin, begin + part.shape[0]))
        if start is not None:
            A, B, scaling = start
            decoded.addmm_(B[begin : begin + rows].float(), A.float(), alpha=scaling)
        total += torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2
        error += torch.linalg.vector_norm(decoded.sub_(part), dtype=torch.float64).item() ** 2
    return error, total
