"""Activations rounded to 8 bits, as an option of the evaluation: what integer products would cost a model.

The inputs of linear layers take the values that their integer form has, in the dtype that they have, so that any
backend evaluates them; nothing becomes faster by it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.heads import SKIP
from ..model.plan import check_skip, plan_layers, skips
from ..model.walk import get_submodule, inside, named_modules
from ..nn.quant_linear import QuantLinear
from .agreement import Agreement, agreement, evaluating
from .batches import Batch, run
from .fake_quantize import FakeQuantLinear
from .layers import inputs_seen, rows_of

MODES, PARTS = ("dynamic", "static"), ("token", "tensor")
Ranges = Mapping[str, tuple[float, float]]  # name of a layer -> the lowest and the highest of its inputs
TABLE: dict[str, dict[str, Any]] = {
    "dynamic, per token, symmetric": {},
    "dynamic, per token, asymmetric": {"symmetric": False},
    "dynamic, per tensor, symmetric": {"per": "tensor"},
    "dynamic, per tensor, asymmetric": {"per": "tensor", "symmetric": False},
    "static, symmetric": {"mode": "static"},
    "static, asymmetric": {"mode": "static", "symmetric": False},
}


def fake_quantize_activations(x: Tensor, low: Tensor, high: Tensor, bits: int = 8, symmetric: bool = True) -> Tensor:
    """x at the nearest of the integers' values over the range from low to high, which broadcast against x.

    Symmetric: `scale = max(|low|, |high|) / (2^(bits-1) - 1)`, `x̂ = scale * round(x / scale)`, as many steps on either
    side. Asymmetric: the range is widened to hold 0, `scale = (high - low) / (2^bits - 1)`, and with the integer
    `zero = round(-low / scale)`, `x̂ = scale * (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero)`: 0 is exact. What
    is outside the range takes its end. In fp32, then rounded to x's dtype. Source: arXiv 1712.05877, section 2.1.
    """
    values, low, high = x.float(), low.float().clamp(max=0), high.float().clamp(min=0)
    least = torch.finfo(torch.float32).tiny
    if symmetric:
        steps = 2 ** (bits - 1) - 1
        scale = (torch.maximum(-low, high) / steps).clamp(min=least)
        return (torch.round(values / scale).clamp(-steps, steps) * scale).to(x.dtype)
    steps = 2**bits - 1
    scale = ((high - low) / steps).clamp(min=least)
    zero = torch.round(-low / scale)
    return ((torch.round(values / scale) + zero).clamp(0, steps).sub(zero) * scale).to(x.dtype)


@contextmanager
def quantized_activations(
    model: nn.Module,
    bits: int = 8,
    mode: str = "dynamic",
    symmetric: bool = True,
    per: str | None = None,
    ranges: Ranges | None = None,
    skip: Iterable[str] = (),
) -> Iterator[list[str]]:
    """A `with` in which the inputs of linear layers are rounded to integers' values; gives the layers' names.

    The layers are those in 4 bits, those that `prepare_qat` made, and what `quantize_model` would replace.

    Args:
        bits: from 2 to 8.
        mode: "dynamic" takes the range of each input as it comes; "static" that of `ranges`, and clips to it.
        symmetric: as in `fake_quantize_activations`.
        per: "token" has a range for each row of the input, "tensor" one for all of it. None is "token", and "tensor"
            where mode is static, which has no other.
        ranges: of every layer, as `activation_ranges` measures them; with mode="static" alone.
        skip: names and patterns as in `nf4kernels.quantize_model`.

    Raises:
        TypeError, ValueError: an argument is wrong, or ranges lack a layer; the model is then unchanged.
    """
    who = "nf4kernels.recover.quantized_activations"
    if mode not in MODES:
        raise ValueError(f"{who}: mode must be one of {MODES}, got {mode!r}")
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{who}: bits must be from 2 to 8, got {bits!r}")
    per = ("token" if mode == "dynamic" else "tensor") if per is None else per
    if per not in PARTS or (mode == "static" and per == "token"):
        raise ValueError(f"{who}: per must be {'tensor' if mode == 'static' else f'one of {PARTS}'}, got {per!r}")
    if (ranges is not None) != (mode == "static"):
        raise ValueError(f"{who}: ranges must come with mode='static', and with it alone, got mode={mode!r}")
    layers = linear_layers(model, skip)
    missing = [name for name in layers if ranges is not None and name not in ranges]
    if missing:
        raise ValueError(f"{who}: ranges must have every layer, got none for {missing[0]}")
    with ExitStack() as stack:
        for name, layer in layers.items():
            bounds = None if ranges is None else ranges[name]
            hook = _rounding(bits, symmetric, per, bounds)
            stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield list(layers)


def activation_ranges(
    model: nn.Module, batches: Iterable[Batch], percentile: float | None = None, skip: Iterable[str] = ()
) -> dict[str, tuple[float, float]]:
    """(lowest, highest) input of each layer that `quantized_activations` takes, over all rows but padding.

    With a `percentile` p, such as 99.9, what p percent of an input are below and above, so that a few large values do
    not set the range; the mean over batches. The model is evaluated, and left in the mode that it had.

    Raises:
        ValueError: percentile is not above 50 and up to 100, or a layer has no input in any batch.
    """
    who = "nf4kernels.recover.activation_ranges"
    if percentile is not None and not 50 < percentile <= 100:
        raise ValueError(f"{who}: percentile must be above 50 and up to 100, got {percentile}")
    seen: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, x: Tensor, mask: Tensor | None) -> None:
        rows = rows_of(x.detach(), mask)
        if rows.numel():
            seen.setdefault(name, []).append(_percentiles(rows, percentile))

    layers = linear_layers(model, skip)
    with inputs_seen(layers, note) as masked, evaluating(model), torch.no_grad():
        for batch in batches:
            masked(batch)
            run(model, batch)
    for name in layers:
        if name not in seen:
            raise ValueError(f"{who}: batches must reach every layer, got no input of {name}")
    if percentile is None:
        return {name: (min(low for low, _ in each), max(high for _, high in each)) for name, each in seen.items()}
    return {name: (_mean([low for low, _ in each]), _mean([high for _, high in each])) for name, each in seen.items()}


def activation_costs(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Batch],
    calibration: Iterable[Batch],
    percentile: float | None = 99.9,
    bits: int = 8,
    skip: Iterable[str] = (),
) -> dict[str, Agreement]:
    """`agreement` with each way to round activations, by name; first "16 bits", the model as it is.

    Static ranges are the lowest and highest of `calibration`, and again with `percentile`, where it is not None.
    """
    batches, calibration, skip = list(batches), list(calibration), tuple(skip)
    found = {"16 bits": agreement(model, reference, batches)}
    # The reference keeps its activations, also where it is the model itself or shares layers with it.
    whole = activation_ranges(model, calibration, skip=skip)
    ways = [(name, options, whole) for name, options in TABLE.items()]
    if percentile is not None:
        cut = activation_ranges(model, calibration, percentile, skip)
        ways += [(f"{name}, {percentile} %", options, cut) for name, options, _ in ways if "mode" in options]
    for name, options, ranges in ways:
        given = ranges if "mode" in options else None
        rounded = RoundedInputs(model, {"bits": bits, "skip": skip, "ranges": given, **options})
        found[name] = agreement(rounded, reference, batches)
    return found


class RoundedInputs(nn.Module):
    """The model in `quantized_activations(**options)` in its own calls alone: the reference may be the same module."""

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with quantized_activations(self.model, **self.options):
            return self.model(*args, **kwargs)


def linear_layers(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Module]:
    """name -> layer of what is in 4 bits, prepared for it, or would be replaced, in the model's order."""
    model, skip = inside(model), tuple(skip)
    check_skip(model, skip, "nf4kernels.recover")
    dense = {get_submodule(model, names[0]) for names in plan_layers(model, (*SKIP, *skip))[0]}
    found: dict[nn.Module, str] = {}
    for name, module in named_modules(model):
        is_ours = isinstance(module, QuantLinear | FakeQuantLinear) and not any(skips(entry, name) for entry in skip)
        if is_ours or (module in dense and isinstance(module, nn.Linear)):
            found.setdefault(module, name)
    return {name: module for module, name in found.items()}


def _rounding(bits: int, symmetric: bool, per: str, bounds: tuple[float, float] | None) -> Callable:
    def rounded(module: nn.Module, args: tuple) -> tuple:
        x, *rest = args
        if not x.numel():
            return args
        if bounds is not None:
            low, high = (torch.tensor(bound, device=x.device) for bound in bounds)
        else:
            low, high = x.aminmax(dim=-1, keepdim=True) if per == "token" else x.aminmax()
        return (fake_quantize_activations(x, low, high, bits, symmetric), *rest)

    return rounded


def _percentiles(x: Tensor, percentile: float | None) -> tuple[float, float]:
    if percentile is None:
        low, high = x.aminmax()
        return low.item(), high.item()
    ordered = x.float().flatten()
    above = max(round(len(ordered) * (100 - percentile) / 100), 0) + 1  # torch.quantile ends at 2^24 values
    return -(-ordered).topk(above).values[-1].item(), ordered.topk(above).values[-1].item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
