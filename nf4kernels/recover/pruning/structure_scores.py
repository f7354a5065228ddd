"""How much a model would miss a head, a channel or a whole block."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..agreement import evaluating
from ..batches import Batch, counted_rows, logits_in, run
from ..layers import mask_of, rows_of
from .scores import METHODS, frozen, gradients_seen, input_norms, loss_of, weight_of
from .structure import Structure

OF_BLOCKS = ("magnitude", "gradient", "influence", "kl")


def methods_of(unit: str) -> tuple[str, ...]:
    return OF_BLOCKS if unit == "layers" else METHODS


def scores_of_units(
    model: nn.Module, structure: Structure, unit: str, method: str, batches: Iterable[Batch] | None, progress: bool
) -> Tensor:
    """fp32 `[blocks, kv groups or channels]`, or `[1, blocks]` of "layers"; what is least missed is smallest.

    magnitude: the L2 norm of all weights that would go.
    wanda: of heads and channels, the Wanda scores (arXiv 2306.11695) of their columns of the last layer, summed.
    gradient: |the sum over positions of activation times dL/d activation| (arXiv 1611.06440), summed over sequences;
        the activation is what the last layer reads, or what a block adds to the stream.
    influence: of blocks, 1 - the mean cosine between input and output (ShortGPT, arXiv 2403.03853).
    kl: of blocks, KL(model || model without the block), nats a row: blocks + 1 forwards a batch.
    """
    if unit == "layers":
        return _of_blocks(model, structure, method, batches, progress)[None]
    layers = [structure.of_block(model, index) for index in range(len(structure.stack_of(model)))]
    last, width = ("down", 1) if unit == "channels" else ("o", structure.width * structure.group)
    if method == "magnitude":
        squares = [_squares(block, structure, unit) for block in layers]
        return torch.stack(squares).sqrt()
    named = {str(index): block[last] for index, block in enumerate(layers)}
    if method == "wanda":
        norms = input_norms(model, named, batches or (), progress)
        columns = [weight_of(layer).abs().sum(0) * norms[name] for name, layer in named.items()]
        return torch.stack([each.reshape(-1, width).sum(1) for each in columns]).cpu()
    sums = {name: torch.zeros(layer.in_features // width) for name, layer in named.items()}

    def add(name: str, x: Tensor, dy: Tensor) -> None:
        terms = x.float() * (dy.float() @ weight_of(named[name]))
        sums[name] += terms.reshape(len(x), -1, terms.shape[-1] // width, width).sum((1, 3)).abs().sum(0).cpu()

    with gradients_seen(named, add), frozen(model), evaluating(model):
        for batch in tqdm(batches, desc="gradients", unit="batch", disable=not progress):
            loss_of(model, batch).backward()
    return torch.stack(list(sums.values()))


def _squares(block: dict[str, nn.Linear], structure: Structure, unit: str) -> Tensor:
    """fp32 `[kv groups or channels]`: the sum of the squares of each one's weights."""
    if unit == "channels":
        rows: dict[str, int] = {role: 1 for role in ("gate", "up") if role in block}
        columns = {"down": 1}
    else:
        wide = structure.width * structure.group
        rows, columns = {"q": wide, "k": structure.width, "v": structure.width}, {"o": wide}
    parts = [weight_of(block[role]).square().sum(1).reshape(-1, width).sum(1) for role, width in rows.items()]
    parts += [weight_of(block[role]).square().sum(0).reshape(-1, width).sum(1) for role, width in columns.items()]
    return torch.stack(parts).sum(0).cpu()


def _of_blocks(model: nn.Module, structure: Structure, method: str, batches: Any, progress: bool) -> Tensor:
    """fp32 `[blocks]`."""
    blocks = list(structure.stack_of(model))
    if method == "magnitude":
        norms = [[parameter.detach().float().norm() for parameter in block.parameters()] for block in blocks]
        return torch.stack([torch.stack(each).norm() for each in norms]).cpu()
    if method == "kl":
        return _kl_without(model, blocks, batches, progress)
    sums, rows = torch.zeros(len(blocks), dtype=torch.float64), torch.zeros(len(blocks))
    masks: list[Tensor | None] = [None]

    def influence(index: int, x: Tensor, y: Tensor) -> None:
        cosines = functional.cosine_similarity(rows_of(x, masks[0]).float(), rows_of(y, masks[0]).float(), dim=-1)
        sums[index] += (1 - cosines).double().sum().cpu()
        rows[index] += len(cosines)

    def taylor(index: int, x: Tensor, y: Tensor) -> None:
        added = (y - x).detach().float()

        def add(dy: Tensor) -> None:
            sums[index] += (added * dy.float()).reshape(len(added), -1).sum(1).abs().double().sum().cpu()

        y.register_hook(add)

    if method == "influence":
        with _streams_seen(blocks, influence), evaluating(model), torch.no_grad():
            for batch in tqdm(batches, desc="influence", unit="batch", disable=not progress):
                masks[0] = mask_of(batch)
                run(model, batch)
        return (sums / rows.clamp(min=1)).float()
    with _streams_seen(blocks, taylor, begins_graph=True), frozen(model), evaluating(model), torch.enable_grad():
        for batch in tqdm(batches, desc="gradients", unit="batch", disable=not progress):
            loss_of(model, batch).backward()
    return sums.float()


@torch.no_grad()
def _kl_without(model: nn.Module, blocks: list[nn.Module], batches: Iterable[Batch], progress: bool) -> Tensor:
    sums, rows = torch.zeros(len(blocks), dtype=torch.float64), 0
    with evaluating(model):
        for batch in tqdm(batches, desc="KL without a layer", unit="batch", disable=not progress):
            p = counted_rows(logits_in(run(model, batch)), batch).float().log_softmax(-1)
            rows += len(p)
            for index, block in enumerate(blocks):
                with bypassed(block):
                    q = counted_rows(logits_in(run(model, batch)), batch).float().log_softmax(-1)
                sums[index] += functional.kl_div(q, p, reduction="sum", log_target=True).double().cpu()
    return (sums / max(rows, 1)).float()


@contextmanager
def bypassed(block: nn.Module) -> Iterator[None]:
    """A `with` in which the block gives back what it reads."""

    def skip(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> Any:
        x = _first_tensor(args, kwargs)
        return x if isinstance(y, Tensor) else type(y)((x, *y[1:]))

    hook = block.register_forward_hook(skip, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _streams_seen(blocks: list[nn.Module], see: Any, begins_graph: bool = False) -> Iterator[None]:
    """A `with` in which `see(index, x, y)` is called for each run of a block, x what it reads and y what it gives."""

    def hook(index: int) -> Any:
        def seen(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> Any:
            x, out = _first_tensor(args, kwargs), y if isinstance(y, Tensor) else y[0]
            if begins_graph and not out.requires_grad:
                out = out.detach().requires_grad_()
            see(index, x, out)
            return out if isinstance(y, Tensor) else type(y)((out, *y[1:]))

        return seen

    hooks = [block.register_forward_hook(hook(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _first_tensor(args: tuple, kwargs: dict) -> Tensor:
    return next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
