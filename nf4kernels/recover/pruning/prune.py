"""prune_model: zeros in the weights that matter least, unstructured or n of m, dense or in 4 bits."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...model.heads import SKIP
from ...model.plan import check_container, check_skip, names_of_modules, plan_layers, skips
from ...model.walk import get_submodule, inside
from ...modes import outside_inference_mode
from ...nn.quant_linear import QuantLinear
from ..batches import Batch
from .masks import apply_masks, keep_by_layer, keep_by_model, keep_by_row, keep_n_of_m, ranked, zero_code
from .scores import MEMORY, METHODS, Layers, again, gradient, input_norms, magnitude, wanda, weight_of

SCOPES = ("row", "layer", "model")
UNSTRUCTURED = "unstructured"


@outside_inference_mode
def prune_model(
    model: nn.Module,
    share: float | None = None,
    pattern: str = UNSTRUCTURED,
    method: str = "magnitude",
    batches: Iterable[Batch] | None = None,
    scope: str | None = None,
    skip: Iterable[str] = (),
    memory: int = MEMORY,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Zeros in the `share` of the weights with the smallest scores, in place; `find_masks`, then `apply_masks`.

    The layers are those that `quantize_model` would take and are nn.Linear, and every QuantLinear, whose Ŵ is scored
    and whose pruned weights become the code of 0. Neither shape nor file gets smaller. Weights that are zero already
    are pruned first, so that a second call at the same share changes nothing.

    Returns:
        The masks: layer -> bool `[N, K]`, True where the weight stays. Training that should keep the zeros needs them.

    Raises:
        TypeError, ValueError: as `find_masks`; the model is then unchanged.
    """
    who = "nf4kernels.recover.prune_model"
    masks = find_masks(model, share, pattern, method, batches, scope, skip, memory, progress, who)
    apply_masks(inside(model), masks)
    return masks


@outside_inference_mode
def find_masks(
    model: nn.Module,
    share: float | None = None,
    pattern: str = UNSTRUCTURED,
    method: str = "magnitude",
    batches: Iterable[Batch] | None = None,
    scope: str | None = None,
    skip: Iterable[str] = (),
    memory: int = MEMORY,
    progress: bool = True,
    who: str = "nf4kernels.recover.find_masks",
) -> dict[str, Tensor]:
    """Which weights `prune_model` would keep; the model is left as it is.

    Args:
        model: any module with layers, whole on its devices.
        share: of the weights to prune, in [0, 1). Of n:m it is 1 - n/m and may be left out.
        pattern: "unstructured", or "n:m" as "2:4": n of each m consecutive columns stay.
        method: "magnitude" (|w|), "wanda" (|w| times the norm of the column's input, arXiv 2306.11695) or "gradient"
            (|w * dL/dw|, summed over batches, arXiv 1906.10771).
        batches: what wanda and gradient run the model on; gradient's need labels or next tokens.
        scope: among which weights the smallest are looked for: "row", "layer" or "model"; None is row with wanda, as
            in its paper, and layer else. n:m has none.
        skip: layers to leave alone, as in `quantize_model`.
        memory: bytes that gradient scores may take at a time. Wanda keeps a vector a layer. The scores of gradient
            with scope="model" are all kept, whatever `memory` says.

    Returns:
        layer -> bool `[N, K]`, a byte a weight.

    Raises:
        TypeError, ValueError: an argument is wrong, an entry of `skip` matches nothing, there is no layer, rows are
            no multiple of m, or a codebook has no zero (the message names the layer).
    """
    model = inside(model)
    check_container(model, "model", who)
    group = _pattern(pattern, who)
    share = _share(share, group, who)
    _check_choice(method, METHODS, "method", who)
    if scope is not None:
        if group is not None:
            raise ValueError(f"{who}: scope must be None with pattern={pattern!r}, got {scope!r}")
        _check_choice(scope, SCOPES, "scope", who)
    if method != "magnitude" and batches is None:
        raise ValueError(f"{who}: batches must be given for method={method!r}, got None")
    layers = prunable(model, skip, who)
    for name, layer in layers.items():
        _check_layer(name, layer, group, who)
    scope = scope or ("row" if method == "wanda" else "layer")
    scored = _Scored(model, layers, method, batches, memory, scope == "model" and group is None, progress)
    if group is None and scope == "model":
        return dict(keep_by_model(scored, share))
    masks = {}
    for name, scores in scored():
        if group is not None:
            masks[name] = keep_n_of_m(scores, *group)
        else:
            masks[name] = keep_by_row(scores, share) if scope == "row" else keep_by_layer(scores, share)
    return masks


def prunable(model: nn.Module, skip: Iterable[str] = (), who: str = "nf4kernels.recover.prunable") -> dict[str, Any]:
    """name -> layer: every nn.Linear that quantize_model would take, and every QuantLinear, but for `skip`.

    Raises:
        ValueError: an entry of `skip` matches nothing, or no layer is left.
    """
    skip = tuple(skip)
    check_skip(model, skip, who)
    patterns = (*SKIP, *skip)
    dense = {names[0] for names in plan_layers(model, patterns)[0]}
    found = {}
    for module, names in names_of_modules(model).items():
        is_ours = isinstance(module, QuantLinear) and not any(skips(p, name) for p in patterns for name in names)
        if is_ours or (names[0] in dense and isinstance(module, nn.Linear)):
            found[names[0]] = module
    if not found:
        raise ValueError(f"{who}: model must have a layer to prune, got none")
    return found


def share_of_zeros(model: nn.Module, names: Iterable[str]) -> float:
    """The share of the weights of those layers that are zero, in W or Ŵ."""
    zeros = total = 0
    for name in names:
        weight = weight_of(get_submodule(model, name))
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    return zeros / total


class _Scored:
    """Each call gives (name, scores) of every layer, weights that are zero below all others."""

    def __init__(self, model, layers: Layers, method: str, batches, memory: int, keep: bool, progress: bool) -> None:
        self._layers, self._method = layers, method
        self._norms: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._gradient: Any = None
        if method == "wanda":
            self._norms = input_norms(model, layers, batches, progress)
        elif method == "gradient":
            self._gradient = lambda: gradient(model, layers, again(batches), memory, progress)
            if keep:
                self._kept = dict(self._gradient())

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        for name, scores in self._raw():
            if not scores.isfinite().all():
                raise ValueError(f"nf4kernels.recover.find_masks: scores must be finite, got NaN or inf at {name}, from"
                                 " what the model makes of batches")  # fmt: skip
            yield name, ranked(scores, weight_of(self._layers[name]))

    def _raw(self) -> Iterator[tuple[str, Tensor]]:
        if self._gradient is not None:
            yield from self._kept.items() if self._kept else self._gradient()
            return
        for name, layer in self._layers.items():
            yield name, magnitude(layer) if self._method == "magnitude" else wanda(layer, self._norms[name])


def _pattern(pattern: str, who: str) -> tuple[int, int] | None:
    """(n, m) of "n:m", None of "unstructured"."""
    if pattern == UNSTRUCTURED:
        return None
    n, colon, m = str(pattern).partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise ValueError(f"{who}: pattern must be {UNSTRUCTURED!r} or 'n:m' with 0 < n < m, got {pattern!r}")
    return int(n), int(m)


def _share(share: float | None, group: tuple[int, int] | None, who: str) -> float:
    if group is not None:
        n, m = group
        if share is not None and abs(share * m - (m - n)) > 1e-6 * m:
            raise ValueError(f"{who}: share must be {(m - n) / m:g} or None with pattern='{n}:{m}', got {share}")
        return (m - n) / m
    if share is None:
        raise ValueError(f"{who}: share must be given with pattern={UNSTRUCTURED!r}, got None")
    if not 0 <= share < 1:
        raise ValueError(f"{who}: share must be in [0, 1), got {share}")
    return share


def _check_choice(value: str, known: Iterable[str], argument: str, who: str) -> None:
    if value not in known:
        raise ValueError(f"{who}: {argument} must be one of {', '.join(known)}, got {value!r}")


def _check_layer(name: str, layer: Any, group: tuple[int, int] | None, who: str) -> None:
    if layer.weight.is_meta:
        raise ValueError(f"{who}: model must be loaded, got layer {name} on the meta device")
    if group is not None and layer.in_features % group[1]:
        raise ValueError(f"{who}: rows of {name} must be a multiple of {group[1]}, got {layer.in_features}")
    if isinstance(layer, QuantLinear):
        try:
            zero_code(layer.qweight)
        except ValueError as error:
            raise ValueError(f"{who}: layer {name}: {str(error).partition(': ')[2]}") from None
    elif not layer.weight.is_floating_point() or not all(map(torch.isfinite, layer.weight.detach().aminmax())):
        raise ValueError(f"{who}: the weight of {name} must be finite floating point, got {layer.weight.dtype}")
