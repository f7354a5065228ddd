"""How much a model would miss a weight: |w|, |w| times the norm of its input, |w * dL/dw|."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...nn.quant_linear import QuantLinear
from ..agreement import evaluating
from ..batches import Batch, cross_entropy, run
from ..layers import inputs_seen, rows_of

METHODS = ("magnitude", "wanda", "gradient")
MEMORY = 2**30  # bytes of gradient scores at a time
Layers = Mapping[str, Any]  # name -> nn.Linear or QuantLinear


def weight_of(layer: Any) -> Tensor:
    """fp32 `[N, K]`: Ŵ of a QuantLinear without its adapter, W of an nn.Linear; not to be written into."""
    if isinstance(layer, QuantLinear):
        return layer.dequantize(torch.float32)
    return layer.weight.detach().float()


def magnitude(layer: nn.Module) -> Tensor:
    """|W|, fp32 `[N, K]`."""
    return weight_of(layer).abs()


def wanda(layer: nn.Module, norm: Tensor) -> Tensor:
    """|W[n, k]| * norm[k], fp32 `[N, K]`, with `norm` of `input_norms`.

    Source: Wanda (arXiv 2306.11695), equation 1.
    """
    return weight_of(layer).abs() * norm


@torch.no_grad()
def input_norms(
    model: nn.Module, layers: Layers, batches: Iterable[Batch], progress: bool = False
) -> dict[str, Tensor]:
    """||x[:, k]||_2 over all rows that a layer reads on `batches`, fp32 `[K]` for each layer, summed in fp64.

    One vector a layer is kept. Positions whose `attention_mask` is 0 do not count. A layer that is not run has zeros.
    """
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}

    def add(name: str, x: Tensor, mask: Tensor | None) -> None:
        sums[name] += rows_of(x, mask).float().square().sum(0).double().cpu()

    with inputs_seen(layers, add) as masked, evaluating(model):
        for batch in tqdm(batches, desc="inputs", unit="batch", disable=not progress):
            masked(batch)
            run(model, batch)
    return {name: each.sqrt().float().to(layers[name].weight.device) for name, each in sums.items()}


def gradient(
    model: nn.Module,
    layers: Layers,
    batches: Callable[[], Iterable[Batch]],
    memory: int = MEMORY,
    progress: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(name, sum over batches of |W * dL/dW|) of each layer, fp32 `[N, K]`; L is a batch's mean cross-entropy.

    The first term of L's Taylor series at w = 0 (arXiv 1611.06440, 1906.10771), of batches one by one, since the mean
    gradient of a trained model is about zero. dL/dW is dY^T X of the layer's own input and output, so that it exists
    for Ŵ too and that no parameter needs a gradient; one layer's is alive at a time. A layer that is run several times
    for a batch counts each time by itself.

    Layers go in groups whose scores take at most `memory` bytes, or one by one; each group is a pass over the batches,
    which `batches()` gives anew.

    Raises:
        ValueError: a batch has nothing to be predicted.
    """
    for group in _groups(layers, memory):
        sums = {name: torch.zeros_like(weight_of(layer)) for name, layer in group.items()}

        def add(name: str, x: Tensor, dy: Tensor, sums: dict[str, Tensor] = sums, group: Layers = group) -> None:
            dw = dy.reshape(-1, dy.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
            sums[name] += dw.mul_(weight_of(group[name])).abs_()

        with gradients_seen(group, add), frozen(model), evaluating(model):
            for batch in tqdm(batches(), desc="gradients", unit="batch", disable=not progress):
                loss_of(model, batch).backward()
        yield from sums.items()


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model, batch, "nf4kernels.recover.pruning")


@contextmanager
def gradients_seen(layers: Layers, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """A `with` in which `see(name, x, dL/dy)` is called in the backward of each run of a layer, y its output.

    The outputs of these layers begin a graph where nothing before them needs a gradient.
    """

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> Any:
            x = (args[0] if args else kwargs["input"]).detach()
            made = y if y.requires_grad else y.detach().requires_grad_()
            made.register_hook(lambda dy: see(name, x, dy))
            return made

        return keep

    hooks = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A `with` in which no parameter requires a gradient; each does again after it that did before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _groups(layers: Layers, memory: int) -> Iterator[dict[str, Any]]:
    group: dict[str, Any] = {}
    taken = 0
    for name, layer in layers.items():
        nbytes = 4 * layer.out_features * layer.in_features
        if group and taken + nbytes > memory:
            yield group
            group, taken = {}, 0
        group[name] = layer
        taken += nbytes
    if group:
        yield group


def again(batches: Iterable[Batch]) -> Callable[[], Iterable[Batch]]:
    """What gives the batches anew each time; an iterator's are kept."""
    kept = batches if not isinstance(batches, Iterator) else list(batches)
    return lambda: chain(kept)
