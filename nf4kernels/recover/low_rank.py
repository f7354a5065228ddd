"""Low rank in the place of a linear layer: the SVD at a rank that a budget gives, weighted by inputs if wanted."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..model.heads import SKIP
from ..model.plan import check_container, plan_layers, replace_module, skips
from ..model.walk import get_submodule, inside
from ..modes import outside_inference_mode
from .agreement import evaluating
from .batches import Batch, run
from .layers import inputs_seen, rows_of

DAMPING = 1e-6  # of the mean of X^T X's diagonal, added to it: inputs that calibration never moved have no Cholesky.
GROWTH = 10  # of the damping where it was too little for the rounding of an fp32 sum


@dataclass(frozen=True)
class LowRankLayer:
    """What was replaced.

    Attributes:
        name: the layer's; its parts are name.0 and name.1.
        shape: (N, K).
        rank: of the replacement, r (N + K) numbers instead of N K.
        error: |W - Ŵ| / |W|, or |X (W - Ŵ)^T| / |X W^T| over the calibration's inputs X.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    error: float


@torch.no_grad()
def low_rank_linear(linear: nn.Linear, rank: int, gram: Tensor | None = None) -> nn.Sequential:
    """Two nn.Linear, K to rank without a bias and rank to N with linear's, whose product is W's best of that rank.

    Best in |W - BA|, or with `gram` = X^T X `[K, K]` in |X (W - BA)^T|: the SVD is then of W L with L L^T = gram, by
    Cholesky, so that what is left out is the tail of its singular values. The factors share the singular values
    evenly, in linear's dtype. The Cholesky factor is in fp64, the SVD in fp32, of an fp64 weight in fp64, too.

    Raises:
        ValueError: rank is not from 1 to min(N, K), or gram has another shape.

    Source: SVD-LLM (arXiv 2403.07378), section 3.2.
    """
    who = "nf4kernels.recover.low_rank_linear"
    N, K = linear.weight.shape
    if not 1 <= rank <= min(N, K):
        raise ValueError(f"{who}: rank must be from 1 to {min(N, K)}, got {rank}")
    root = None if gram is None else _root(gram, K, who)
    U, S, Vh = torch.linalg.svd(_weighted(linear, root), full_matrices=False)
    U, S, Vh = U.double(), S.double(), Vh.double()
    A, B = S[:rank].sqrt()[:, None] * Vh[:rank], U[:, :rank] * S[:rank].sqrt()
    if root is not None:
        A = torch.linalg.solve_triangular(root, A, upper=False, left=False)
    first = nn.Linear(K, rank, bias=False, device="meta")
    second = nn.Linear(rank, N, bias=linear.bias is not None, device="meta")
    for part, weight in ((first, A), (second, B)):
        part.weight = nn.Parameter(weight.to(linear.weight.dtype).contiguous(), linear.weight.requires_grad)
    second.bias = linear.bias
    return nn.Sequential(first, second).train(linear.training)


@outside_inference_mode
def low_rank_model(
    model: nn.Module,
    layers: Iterable[str] | None = None,
    rank: int | None = None,
    share: float | None = None,
    budget: int | None = None,
    batches: Iterable[Batch] | None = None,
    progress: bool = True,
) -> list[LowRankLayer]:
    """Replace nn.Linear layers that `quantize_model` would take by `low_rank_linear`, in place; it takes the parts.

    One of rank, share and budget says how far: `rank` is every layer's; `share` leaves each layer that share of its
    numbers; `budget` is the bytes of all chosen layers together, of which each next one goes to the singular value
    that takes the largest part of its layer's squared weight a byte. A layer that would not become smaller stays.

    Args:
        layers: names or patterns as `quantize_model`'s skip has them; None is every layer.
        batches: calibration for the weighting by inputs; one pass, with a `[K, K]` fp32 matrix a layer in memory.

    Raises:
        ValueError: not exactly one of the three is given or it is out of its range, an entry of `layers` matches no
            layer, a layer has no input in `batches`; the model is then unchanged.
    """
    who = "nf4kernels.recover.low_rank_model"
    check_container(model, "model", who)
    model = inside(model)
    if sum(each is not None for each in (rank, share, budget)) != 1:
        raise ValueError(f"{who}: one of rank, share and budget must be given, got {rank}, {share}, {budget}")
    for name, value in (("rank", rank), ("share", share), ("budget", budget)):
        if value is not None and not value > 0:
            raise ValueError(f"{who}: {name} must be above 0, got {value}")
    if share is not None and share >= 1:
        raise ValueError(f"{who}: share must be below 1, got {share}")
    found = _chosen(model, layers, who)
    grams = {} if batches is None else input_grams(model, list(found), batches)
    dense: dict[str, Any] = {name: get_submodule(model, name) for name in found}
    ranks = _ranks(dense, grams, rank, share, budget)
    made = []
    for name, names in tqdm(found.items(), desc="low rank", unit="layer", disable=not progress):
        linear, gram, chosen = dense[name], grams.pop(name, None), ranks[name]
        if chosen is None:
            continue
        parts = low_rank_linear(linear, chosen, gram)
        made.append(LowRankLayer(name, tuple(linear.weight.shape), chosen, _error(linear, parts, gram)))
        replace_module(model, names, linear, parts)
    return made


@torch.no_grad()
def input_grams(model: nn.Module, names: Iterable[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """name of a linear layer -> X^T X `[K, K]`, fp32, over all rows that it gets, without padding.

    Raises:
        ValueError: a layer gets no row, or one with NaN or inf.
    """
    grams: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, mask: Tensor | None) -> None:
        X = rows_of(x, mask).float()
        if len(X):
            grams[name] = X.mT @ X if name not in grams else grams[name].addmm_(X.mT, X)

    layers = {name: get_submodule(model, name) for name in names}
    with inputs_seen(layers, add) as masked, evaluating(model):
        for batch in batches:
            masked(batch)
            run(model, batch)
    who = "nf4kernels.recover.input_grams"
    for name in layers:
        if name not in grams:
            raise ValueError(f"{who}: batches must reach every layer, got no input of {name}")
        if not grams[name].isfinite().all():
            raise ValueError(f"{who}: batches must give layers finite inputs, got NaN or inf at {name}")
    return grams


def _chosen(model: nn.Module, layers: Iterable[str] | None, who: str) -> dict[str, list[str]]:
    found = {names[0]: names for names in plan_layers(model, SKIP)[0]}
    found = {name: names for name, names in found.items() if isinstance(get_submodule(model, name), nn.Linear)}
    if layers is None:
        return found
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(skips(pattern, name) for names in found.values() for name in names):
            raise ValueError(f"{who}: layers must name layers that quantize_model would take, got {pattern!r}")
    return {n: names for n, names in found.items() if any(skips(p, each) for p in patterns for each in names)}


def _ranks(dense, grams, rank: int | None, share: float | None, budget: int | None) -> dict[str, int | None]:
    """The rank of each layer; None where it would not be smaller than the layer is."""
    sizes = {name: tuple(linear.weight.shape) for name, linear in dense.items()}
    most = {name: (N * K - 1) // (N + K) for name, (N, K) in sizes.items()}
    if rank is not None:
        return {name: rank if rank <= most[name] else None for name in sizes}
    if share is not None:
        wanted = {name: max(int(share * N * K / (N + K)), 1) for name, (N, K) in sizes.items()}
        return {name: rank if rank <= most[name] else None for name, rank in wanted.items()}
    if budget >= sum(linear.weight.nbytes for linear in dense.values()):
        return dict.fromkeys(sizes)
    costs = {name: sum(sizes[name]) * linear.weight.element_size() for name, linear in dense.items()}
    left = budget - sum(costs.values())
    if left < 0:
        raise ValueError(
            f"nf4kernels.recover.low_rank_model: budget must be {sum(costs.values())} bytes or more, rank 1 of every"
            f" layer, got {budget}"
        )
    candidates = []
    for name, linear in dense.items():
        who = "nf4kernels.recover.low_rank_model"
        root = None if name not in grams else _root(grams[name], sizes[name][1], who)
        squares = torch.linalg.svdvals(_weighted(linear, root)).double().square()
        total = squares.sum().item() or 1.0
        gains = (squares / total / costs[name])[1 : most[name]]  # every layer has the first
        candidates += [(-gain, name) for gain in gains.tolist()]
    ranks: dict[str, int | None] = dict.fromkeys(sizes, 1)
    for _, name in sorted(candidates, key=lambda each: each[0]):  # those of a layer come in their own order
        if costs[name] <= left:
            ranks[name] += 1  # type: ignore[operator]  # a number
            left -= costs[name]
    return ranks


def _weighted(linear: nn.Linear, root: Tensor | None) -> Tensor:
    """W, or W L, to be decomposed: in fp32, which takes a quarter of fp64's time, but for a weight in fp64."""
    W = linear.weight.detach()
    product = W if root is None else W.double() @ root
    return product.to(torch.float64 if W.dtype == torch.float64 else torch.float32)


def _root(gram: Tensor, K: int, who: str) -> Tensor:
    """The lower L with L L^T = gram, fp64, its diagonal damped."""
    if gram.shape != (K, K):
        raise ValueError(f"{who}: gram must have shape {[K, K]}, got {list(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError(f"{who}: gram must be finite, got NaN or inf")
    G = gram.double()
    damping = DAMPING * G.diagonal().mean().clamp(min=1e-30)
    while True:
        root, failed = torch.linalg.cholesky_ex(G + damping * torch.eye(K, dtype=G.dtype, device=G.device))
        if not failed:
            return root
        damping = damping * GROWTH


def _error(linear: nn.Linear, parts: Any, gram: Tensor | None) -> float:
    W = linear.weight.detach().double()
    left = W - parts[1].weight.detach().double() @ parts[0].weight.detach().double()
    if gram is None:
        return (left.norm() / W.norm().clamp(min=1e-300)).item()
    G = gram.double()
    squares = [((each @ G) * each).sum().clamp(min=0) for each in (left, W)]
    return (squares[0] / squares[1].clamp(min=1e-300)).sqrt().item()
