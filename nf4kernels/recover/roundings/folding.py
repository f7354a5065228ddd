"""Scales of a layer's inputs, folded into what makes these inputs, so that the model computes what it computed."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...model.walk import get_submodule, named_modules
from .calibration import Calibration, after, on_input

PLUS_ONE_SHARE = 0.02  # of what scaling the producer alone changes: what is left of it where 1 + weight was rounded
SEED = 0


@dataclass(frozen=True)
class Fold:
    """A producer whose output `[..., K]` nobody but the consumers reads, up to operations that keep a factor.

    Attributes:
        producer: a norm with a weight `[K]`, or an nn.Linear with K outputs.
        consumers: nn.Linear's of K inputs.
        names: of producer and consumers.
        plus_one: whether the norm multiplies by 1 + weight.
    """

    producer: Any
    consumers: Sequence[nn.Linear]
    names: tuple[str, ...] = ()
    plus_one: bool = False

    @torch.no_grad()
    def apply(self, scale: Tensor, consumers: bool = True) -> None:
        """Divide the producer's output by `scale` `[K]`, fp32, and multiply the consumers' columns by it, in place."""
        weight, bias = self.producer.weight, self.producer.bias if hasattr(self.producer, "bias") else None
        if self.plus_one:
            weight.copy_((weight.float() + 1) / scale - 1)
        else:
            weight.copy_(weight.float() / (scale[:, None] if weight.dim() == 2 else scale))
        if bias is not None:
            bias.copy_(bias.float() / scale)
        for consumer in self.consumers if consumers else ():
            consumer.weight.copy_(consumer.weight.float() * scale)

    def parameters(self) -> list[nn.Parameter]:
        own = [self.producer.weight, getattr(self.producer, "bias", None), *(c.weight for c in self.consumers)]
        return [parameter for parameter in own if parameter is not None]


def find_folds(calibration: Calibration, block: str) -> list[Fold]:
    """Those in a block that leave its output on the first batch as it is, bit for bit, when scaled by powers of 2.

    Norms whose output linear layers read; and linear layers from whose output to the input of one other a factor is
    kept: v to o where each has its own heads, up to down, the two layers around a ReLU. Where the norm multiplies by
    1 + weight, which a stored weight rounds, the output may move a little.
    """
    found = []
    for candidates in _candidates(calibration, block):
        for fold in candidates:
            if probed := _probed(calibration, fold):
                found.append(probed)
                break
    return found


def given_fold(calibration: Calibration, producer: str, consumers: Sequence[str]) -> Fold:
    """The fold of these names; ValueError where it changes what the block computes."""
    model = calibration.model
    fold = Fold(
        get_submodule(model, producer), [_linear(get_submodule(model, name), name) for name in consumers],
        (producer, *consumers),
    )  # fmt: skip
    probed = _probed(calibration, fold)
    if probed is None:
        raise ValueError(
            f"nf4kernels.recover.Awq: folds must leave what the model computes as it is, got {producer} into"
            f" {', '.join(consumers)}"
        )
    return probed


def _linear(module: nn.Module, name: str) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise ValueError(f"nf4kernels.recover.Awq: folds must end in nn.Linear, got {type(module).__name__} at {name}")
    return module


def _candidates(calibration: Calibration, block: str) -> Iterator[list[Fold]]:
    """For each tensor that dense linear layers of the block read, what may produce it, the likeliest first."""
    inside = [
        (f"{block}.{name}".strip("."), module)
        for name, module in named_modules(get_submodule(calibration.model, block))
        if not module._modules
    ]
    shared = _shared_parameters(calibration.model)
    read: dict[Any, list[tuple[str, nn.Linear]]] = {}
    norms: dict[Any, tuple[str, nn.Module]] = {}
    calls: list[tuple[str, nn.Module]] = []  # of linear layers, in order
    kept: list[Tensor] = []  # so that no address is used twice

    def key(x: Tensor) -> tuple:
        kept.append(x)
        return x.data_ptr(), x.shape

    def seen_input(x: Tensor, name: str, module: nn.Linear) -> None:
        calls.append((name, module))
        readers = read.setdefault(key(x), [])
        if (name, module) not in readers:
            readers.append((name, module))

    def seen_output(output: Any, name: str, module: nn.Module) -> None:
        if isinstance(output, Tensor):
            norms[key(output)] = (name, module)

    with ExitStack() as hooks:
        for name, module in inside:
            if type(module) is nn.Linear:
                record = lambda x, name=name, module=module: seen_input(x, name, module)  # noqa: E731
                hooks.enter_context(on_input(module, record))
            elif _is_norm(module):
                record = lambda y, name=name, module=module: seen_output(y, name, module)  # noqa: E731
                hooks.enter_context(after(module, record))
        calibration.run(0)

    for place, readers in read.items():
        names, consumers = [name for name, _ in readers], [module for _, module in readers]
        if any(id(module.weight) in shared for module in consumers):
            continue
        if place in norms:
            earlier = [norms[place]]
        elif len(readers) == 1:
            before = calls[: calls.index(readers[0])]
            earlier = [(n, m) for n, m in reversed(before) if m.out_features == consumers[0].in_features]
        else:
            continue
        yield [
            Fold(producer, consumers, (name, *names))
            for name, producer in earlier
            if not any(id(parameter) in shared for parameter in producer.parameters())
        ]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of those that several modules have, or one that stands in several places."""
    once: set[int] = set()
    shared: set[int] = set()
    for _, module in named_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in once else once).add(id(parameter))
    return shared


def _probed(calibration: Calibration, fold: Fold) -> Fold | None:
    """The fold, with plus_one where that is so; None where it is none."""
    K = fold.consumers[0].in_features
    generator = torch.Generator().manual_seed(SEED)
    scale = 2.0 ** torch.randint(-1, 2, (K,), generator=generator).float().to(fold.consumers[0].weight.device)
    with unchanged(fold):
        before = outputs(calibration)
        fold.apply(scale)
        if difference(outputs(calibration), before) == 0:
            return fold
    if fold.producer.weight.dim() == 2:
        return None
    plus_one = Fold(fold.producer, fold.consumers, fold.names, True)
    with unchanged(fold):
        plus_one.apply(scale, consumers=False)
        alone = difference(outputs(calibration), before)
    with unchanged(fold):
        plus_one.apply(scale)
        return plus_one if difference(outputs(calibration), before) <= PLUS_ONE_SHARE * alone else None


class unchanged:  # noqa: N801 (a context manager)
    """A `with` after which the fold's parameters are what they were; `keep` lets them stay as they are by then."""

    def __init__(self, fold: Fold) -> None:
        self.parameters = fold.parameters()

    def __enter__(self) -> "unchanged":
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        return self

    def keep(self) -> None:
        self.parameters = []

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for parameter, values in zip(self.parameters, self.values):
            parameter.copy_(values)


def outputs(calibration: Calibration) -> list[Tensor]:
    """The floating-point tensors that the block returns for the first batch."""
    found: list[Tensor] = []
    calibration.run(
        0,
        lambda output: found.extend(
            t.clone() for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()
        ),
    )
    return found


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """|ours - theirs| / |theirs|; infinite where they do not compare."""
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs)):
        return torch.inf
    error = sum((a.double() - b.double()).square().sum().item() for a, b in zip(ours, theirs))
    total = sum(b.double().square().sum().item() for b in theirs)
    if error != error:
        return torch.inf
    return 0.0 if error == 0 else (error / total) ** 0.5 if total else torch.inf
