"""What a layer's input looks like on calibration data, the layers before it being rounded, a few layers at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...model.targets import Target
from ...model.walk import get_submodule
from ..agreement import evaluating
from ..batches import Batch, run

MOST_BYTES = 4 << 30  # of Hessians that are gathered in one pass
LISTS = (nn.ModuleList, nn.Sequential)


@dataclass
class Statistics:
    """Of the rows x `[K]` that a layer reads, summed in fp32.

    Attributes:
        hessian: fp32 `[K, K]`, the mean of x^T x: of an error E `[N, K]` of the weight, tr(E H E^T) is the mean squared
            error of the output.
        mean, mean_abs: fp32 `[K]`, the means of x and of |x|.
        rows: how many; 0 where the data never reach the layer, and then all others are zeros.
    """

    hessian: Tensor
    mean: Tensor
    mean_abs: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, K: int, device: torch.device) -> "Statistics":
        return cls(torch.zeros(K, K, device=device), torch.zeros(K, device=device), torch.zeros(K, device=device))

    def add(self, x: Tensor) -> None:
        """Count rows `[M, K]`; the three tensors are sums until `divide`."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            self.hessian.addmm_(x.T, x)
        self.mean += x.sum(0)
        self.mean_abs += x.abs().sum(0)
        self.rows += len(x)

    def divide(self) -> None:
        for sums in (self.hessian, self.mean, self.mean_abs):
            sums /= max(self.rows, 1)

    @property
    def is_finite(self) -> bool:
        return bool(self.hessian.isfinite().all())


class _StoppedError(Exception):
    """Ends a forward pass after the block that was asked for."""


@dataclass
class _Block:
    """The element of a list of modules that targets are in: a decoder block; the model itself where there is none."""

    name: str
    before: list[str]  # the elements of that list before it
    targets: list[Target] = field(default_factory=list)


class Calibration:
    """Statistics of each target's input, from batches, the model being rounded in the targets' order meanwhile.

    One block (an element of the outermost ModuleList or Sequential that holds a target) is run at a time: the outputs
    of the one before it are kept, and those before that are not called. Where a model's blocks do not follow on one
    another, each once, the whole model is run for each.

    Args:
        model: as `recover.batches.run` takes it; evaluated, without gradients. Hooks are added and taken away again.
        targets: what is rounded, in order.
        batches: at least one, as recover/batches.py has them; gone through several times. Positions where
            `attention_mask` is 0 do not count.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], batches: Iterable[Batch]) -> None:
        self.model = model
        self.batches = list(batches)
        self.batch = self.batches[0]  # the one that runs
        self.blocks = _blocks(model, targets)
        self._block: _Block | None = None
        self._outputs: list[Any] | None = None  # of the block before, a batch an entry
        self._chained: dict[str, bool] = {}
        self._waves: list[list[list[Target]]] = []
        self._found: dict[str, Statistics] = {}

    def enter(self, target: Target) -> _Block | None:
        """The target's block where it is another than the last one's, with all before it rounded."""
        block = self.blocks[target.name]
        if block is self._block:
            return None
        self._advance(block)
        self._block, self._found = block, {}
        self._waves = self._waves_of(block)
        return block

    def of(self, target: Target) -> Statistics:
        """The statistics of a target in the block that was entered last.

        Raises:
            ValueError: what it reads is not finite.
        """
        if target.name not in self._found:
            wave = next(w for w in self._waves if any(target.name == t.name for group in w for t in group))
            self._found = self.gather(wave)
        return self._found[target.name]

    @property
    def block(self) -> str:
        """The name of the block that was entered last; "" is the model."""
        return "" if self._block is None else self._block.name

    def groups(self) -> list[list[Target]]:
        """The targets of the block, those together that read the same tensor."""
        return [group for wave in self._waves for group in wave]

    def gather(self, groups: Sequence[Sequence[Target]]) -> dict[str, Statistics]:
        """name -> the statistics of that group's input."""
        found = self._gathered(groups)
        if self._outputs is not None and not all(each.is_finite for each in found.values()):
            # a NaN of a block that was left out may have been read
            self._outputs, self._chained = None, dict.fromkeys(self._chained, False)
            found = self._gathered(groups)
        for name, each in found.items():
            if not each.is_finite:
                raise ValueError(f"nf4kernels.recover: batches must give finite inputs, got others at {name}")
        return found

    def _gathered(self, groups: Sequence[Sequence[Target]]) -> dict[str, Statistics]:
        found = {}
        with ExitStack() as hooks:
            for first, *others in groups:
                dense = first.dense(self.model)
                found[first.name] = Statistics.zeros(dense.in_features, dense.weight.device)
                hooks.enter_context(on_input(dense, _adder(found[first.name], self)))
                found.update({other.name: found[first.name] for other in others})
            for number in range(len(self.batches)):
                self.run(number)
        for statistics in {id(each): each for each in found.values()}.values():
            statistics.divide()
        return found

    @torch.no_grad()
    def run(self, number: int, seen: Callable[[Any], None] | None = None) -> None:
        """Run the block that was entered (the model, where blocks do not chain) on a batch; `seen` gets its output."""
        block = self._block
        self.batch = self.batches[number]
        chained = block is not None and self._chained.get(block.name, False)
        with evaluating(self.model), torch.compiler.set_stance("force_eager"), ExitStack() as changes:
            if block is not None and block.name:
                module = get_submodule(self.model, block.name)
                if chained and self._outputs is not None:
                    output = tree_map_only(Tensor, torch.clone, self._outputs[number])  # a block may write into it
                    poison = tree_map_only(Tensor, _poisoned, output)
                    for name in block.before[:-1]:
                        changes.enter_context(_returning(get_submodule(self.model, name), poison))
                    changes.enter_context(_returning(get_submodule(self.model, block.before[-1]), output))
                changes.enter_context(after(module, seen, stop=chained))
            try:
                output = run(self.model, self.batch)
            except _StoppedError:
                return
            if seen is not None and (block is None or not block.name):
                seen(output)

    def _advance(self, block: _Block) -> None:
        """Go to a block: its input is the output of the one before it, which is rounded by now."""
        if block.name and block.name not in self._chained:
            self._chained[block.name] = False
            names = {block.name, *block.before} | {b.name for b in self.blocks.values() if block.name in b.before}
            follows = self._follow_on_another(sorted(names, key=lambda name: int(name.rpartition(".")[2])))
            self._chained.update(dict.fromkeys(names, follows))
        previous = self._block
        if not self._chained.get(block.name, False) or not block.before:
            self._outputs = None
            return
        if previous is not None and previous.name == block.before[-1]:
            kept = self._outputs
            outputs: list[Any] = []
            for number in range(len(self.batches)):
                self.run(number, outputs.append)
            self._outputs = outputs if kept is None or len(outputs) == len(kept) else None
            return
        self._block, self._outputs = _Block(block.before[-1], block.before[:-1]), None
        outputs = []
        for number in range(len(self.batches)):
            self.run(number, outputs.append)
        self._outputs = outputs

    @torch.no_grad()
    def _follow_on_another(self, names: list[str]) -> bool:
        """Whether the first batch goes through these blocks in order, each once."""
        called: list[str] = []

        def noting(name: str) -> Callable[[Any], None]:
            return lambda _: called.append(name)

        self.batch = self.batches[0]
        with evaluating(self.model), torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
            for name in names:
                hooks.enter_context(after(get_submodule(self.model, name), noting(name)))
            run(self.model, self.batch)
        return called == names

    def _waves_of(self, block: _Block) -> list[list[list[Target]]]:
        """Groups of targets that read the same tensor, and in waves those groups that are gathered in one pass.

        One wave is what reads the same, and layers of one name in it (a layer of all experts), as far as MOST_BYTES.
        """
        inputs: dict[str, Any] = {}
        linear = [t for t in block.targets if type(t.dense(self.model)) is nn.Linear]  # of those not rounded yet
        with ExitStack() as hooks:
            for target in linear:
                record = lambda x, name=target.name: inputs.setdefault(name, x)  # noqa: E731 (binds its name)
                hooks.enter_context(on_input(target.dense(self.model), record))
            if self.batches and linear:
                self.run(0)
        groups: dict[Any, list[Target]] = {}
        for target in linear:
            x = inputs.get(target.name)  # kept until here, so that no address was used twice
            groups.setdefault(target.name if x is None else (x.data_ptr(), x.shape, x.stride()), []).append(target)
        waves: list[list[list[Target]]] = []
        sizes: list[int] = []
        leaves: list[set[str]] = []
        for group in groups.values():
            size = 4 * group[0].dense(self.model).in_features ** 2
            leaf = {target.name.rpartition(".")[2] for target in group}
            if waves and leaf & leaves[-1] and sizes[-1] + size <= MOST_BYTES:
                waves[-1].append(group)
                sizes[-1] += size
                leaves[-1] |= leaf
                continue
            waves.append([group])
            sizes.append(size)
            leaves.append(leaf)
        return waves


def _blocks(model: nn.Module, targets: Sequence[Target]) -> dict[str, _Block]:
    """Target -> its block."""
    blocks: dict[str, _Block] = {}
    found = {}
    for target in targets:
        name, before = "", []
        parts = target.name.split(".")
        for end in range(len(parts)):
            parent = ".".join(parts[:end])
            if isinstance(get_submodule(model, parent), LISTS) and parts[end].isdigit():
                name = ".".join(parts[: end + 1])
                before = [".".join([*parts[:end], str(i)]) for i in range(int(parts[end]))]
                break
        block = blocks.setdefault(name, _Block(name, before))
        block.targets.append(target)
        found[target.name] = block
    return found


def _adder(statistics: Statistics, calibration: Calibration) -> Callable[[Tensor], None]:
    def add(x: Tensor) -> None:
        batch = calibration.batch
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and mask.dim() == 2 and mask.shape == x.shape[:-1]:
            statistics.add(x[mask.bool()])
        else:
            statistics.add(x.reshape(-1, x.shape[-1]))

    return add


@contextmanager
def on_input(module: nn.Module, seen: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_module, args, kwargs) -> None:
        seen((args[0] if args else kwargs["input"]).detach())

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, seen: Callable[[Any], None] | None, stop: bool = False) -> Iterator[None]:
    def hook(_module, _args, output) -> None:
        if seen is not None:
            seen(output)
        if stop:
            raise _StoppedError

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """While it lasts, the module is not computed."""
    own = vars(module).get("forward")  # set on the instance, as accelerate does
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _poisoned(tensor: Tensor) -> Tensor:
    """What a reader of a block that was left out shall not take for its output: one NaN of that shape, no memory."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.new_full((), torch.nan).expand(tensor.shape)
