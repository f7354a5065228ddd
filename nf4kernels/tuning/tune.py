"""Measures the present card, and writes the table that its products run by from then on."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..backends import native, select
from ..backends.tuned_files import Card, cache_path, card_of
from ..backends.tuned_table import ANY_ROWS, CUDA_PRODUCTS, PRODUCTS, Config, CudaOp, Rule, Table
from ..storage.atomic import replacing
from .cuda import CudaLibrary, tune_cuda
from .products import SHAPES, Candidate, Native, Product, Times
from .search import Budget
from .timer import Clock, Timer
from .triton import dequantize_gemm_from, tune_backends, tune_configs

SECONDS, QUICK_SECONDS = 105.0, 25.0  # two minutes and half a minute, with what starts before and ends after them
CUDA_SHARE, CONFIGS_SHARE = 0.55, 0.7  # of what is left, where more follows


class TuneError(ValueError):
    """What keeps a card from being measured, or its table from being written."""


@dataclass
class Machine:
    """What is measured: a card, its clock, and the backends that run there."""

    card: Card
    times: Times
    cuda: CudaLibrary | None = None
    configs: Mapping[str, Mapping] = field(default_factory=dict)  # Triton's, as predicted; none: it does not run
    gemm_from: Mapping[str, int] = field(default_factory=dict)
    use: Callable[[Mapping[str, CudaOp]], None] = lambda ops: None  # of the library, from now on


def measure(machine: Machine, quick: bool, budget: Budget, say: Callable[[str], None]) -> Table:
    """The table of what there was time for; what it lacks stays predicted.

    Raises TuneError where there was time for nothing, or nothing ran.
    """
    began, shapes = budget.left(), 1 if quick else len(SHAPES)
    cuda: dict[str, CudaOp] = {}
    if machine.cuda is not None:
        say("CUDA's kernels, tiles and splits")
        share = CUDA_SHARE if machine.configs else 1.0
        cuda = tune_cuda(machine.cuda, machine.times, CUDA_PRODUCTS, shapes, budget.part(share), say)
        machine.use(cuda)
    found: dict[str, dict[int, Config]] = {}
    least: dict[str, int] = {}
    rules: tuple[Rule, ...] = ()
    if machine.configs:
        few = SHAPES[: min(shapes, 2)]
        if not quick:
            say("Triton's configurations")
            found = tune_configs(machine.configs, machine.times, few[:1], budget.part(CONFIGS_SHARE))
        best = {op: {**buckets, **found.get(op, {})} for op, buckets in machine.configs.items()}
        say("Triton's kernels against dequantize + GEMM")
        least = dequantize_gemm_from(best, machine.times, few, budget.part(0.5), say)
        if machine.cuda is not None:
            say("CUDA against Triton")
            rules = tune_backends(best, {**machine.gemm_from, **least}, machine.times, few, budget)
    if not (cuda or found or least or rules):
        raise TuneError(f"must have time for one op at least, whose kernels run, got none measured in {began:.0f} s")
    origin = f"{time.strftime('%Y-%m-%d')}, {began - budget.left():.0f} s" + (", --quick" if quick else "")
    return Table(
        machine.card.architecture, origin, machine.card.name, machine.card.versions(), cuda, found, least, rules
    )


def machine_of(device: torch.device, say: Callable[[str], None]) -> Machine:
    """The card of a device, with the backends that can run there and are not forbidden.

    Raises TuneError where none is but the reference.
    """
    decision = select.decide(device.type)
    backends = select.available(device.type)
    if not backends:
        raise TuneError(f"must have compiled kernels or Triton on the GPU, got {decision.implementation}: "
                        f"{decision.reason}")  # fmt: skip
    card = card_of(device.type, device.index)
    kernels = {backend: select.kernels_of(backend) for backend in backends}
    triton = select.triton_choices() if "triton" in backends else None
    handle = select.cuda_library()[0] if "native" in backends else None
    library = None if handle is None else Library(handle, device.index)

    def product(op: str, candidate: Candidate) -> tuple[Callable[..., torch.Tensor], AbstractContextManager]:
        if isinstance(candidate, Native):
            assert library is not None
            return kernels["native"][op], library.running(candidate)
        assert triton is not None
        return kernels["triton"][op], triton.forcing(candidate.path, candidate.config)

    timer = Timer(Clock(device), product, say, triton.REFUSALS if triton is not None else ())
    if handle is not None:
        timer.forget_graphs = handle.forget_graphs
    machine = Machine(card, timer)
    if library is not None:
        machine.cuda, machine.use = library, library.use
    if triton is not None:
        table = triton.table_for(triton.architecture_of(device))
        machine.configs = {op: dict(table.configs[op]) for op in PRODUCTS}
        machine.gemm_from = table.dequantize_gemm_from
    return machine


class Library:
    """The CUDA library for a device, tuned to a candidate while that is asked or timed."""

    def __init__(self, library: native.CudaLibrary, device: int, arch: int = 0, multiprocessors: int = 0) -> None:
        self.library, self.device = library, device
        self.current: Mapping[str, CudaOp] = {}
        if not arch:
            properties = torch.cuda.get_device_properties(device)
            arch, multiprocessors = 10 * properties.major + properties.minor, properties.multi_processor_count
        self.arch, self.multiprocessors = arch, multiprocessors

    def tiles(self, op: str) -> list[str]:
        return native.cuda_tiles(self.library.handle, op)

    def use(self, ops: Mapping[str, CudaOp]) -> None:
        self.current = ops
        native.tune_cuda(self.library.handle, self.device, ops, "measured now")

    @contextmanager
    def running(self, candidate: Native) -> Iterator[None]:
        """Products are chosen as the candidate says, inside a `with` block."""
        before = self.current
        if candidate.kernel:
            self.use({op: candidate.only(self.tiles(op)) for op in CUDA_PRODUCTS})
        try:
            yield
        finally:
            self.use(before)

    def choice(self, product: Product, candidate: Native) -> tuple[str, int, int] | None:
        """Kernel, tile and splits; None where choose.h takes another kernel than the candidate's, which cannot run."""
        with self.running(candidate):
            kernel, tile, splits = self._chosen(product)
        return (kernel, tile, splits) if (kernel, tile) == (candidate.kernel, candidate.tile) else None

    def tile_of(self, product: Product, own: CudaOp) -> int:
        """The tile that tiled has for a product by these parameters."""
        before = self.current
        self.use({product.op: replace(own, small=0, tiled=ANY_ROWS)})
        try:
            return self._chosen(product)[1]
        finally:
            self.use(before)

    def cycles(self, product: Product, tile: int, blocks: int) -> float:
        """What is predicted for one weight's product by a tile, in its best splits."""
        is_dgrad, sizes = product.op.endswith("dgrad"), (product.rows, *product.shape)
        return self.library.tile_cycles(is_dgrad, True, *sizes, self.arch, self.multiprocessors, tile, blocks)

    def _chosen(self, product: Product) -> tuple[str, int, int]:
        problem = product.op.endswith("dgrad"), native.BFLOAT16, product.rows, *product.shape, product.experts
        card = self.arch, self.multiprocessors
        return self.library.choice(self.device, *problem, True, True, *card)[:3]


def check_writable(path: Path) -> None:
    """Raises TuneError where no table can be written there; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path.with_name(f".{path.name}.tried")):
            pass
        path.with_name(f".{path.name}.tried").unlink()
    except OSError as error:
        raise TuneError(f"must write {path}, got {error.strerror}") from None


def save(table: Table, path: Path) -> None:
    """The file appears whole, in the place of the former one, or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(table.to_json(), encoding="utf-8")


@dataclass
class Progress:
    """A bar of seconds, whose words are what is measured now; what is said appears above it."""

    budget: Budget
    bar: Any = None

    def __enter__(self) -> "Progress":
        self.bar = tqdm(total=round(self.budget.seconds), unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def watch(self, times: Times) -> Times:
        def watched(product: Product, candidates, budget: Budget):
            self.bar.set_description(str(product), refresh=False)
            self.bar.update(min(self.budget.seconds - self.budget.left(), self.bar.total) - self.bar.n)
            return times(product, candidates, budget)

        return watched

    def say(self, text: str) -> None:
        self.bar.write(text)


def tune(device: torch.device, quick: bool = False, output: Path | None = None) -> tuple[Path, Table]:
    """Measures a device, and writes its table to the user's cache or to `output`, a file or a folder: (path, table).

    Nothing is written before all is measured, so that an interrupted run leaves the former table.

    Raises TuneError.
    """
    card = card_of(device.type, device.index)
    path = output or cache_path(card)
    if path is not None and path.is_dir():
        path /= card.file_name
    if path is None:
        raise TuneError("must have a directory to write to, got an empty NF4KERNELS_CACHE or no home: give --output")
    check_writable(path)
    with Progress(Budget(QUICK_SECONDS if quick else SECONDS, time.monotonic)) as progress:
        machine = machine_of(device, progress.say)
        machine.times = progress.watch(machine.times)
        try:
            table = measure(machine, quick, progress.budget, progress.say)
        except RuntimeError as error:  # outside of a candidate: the device itself fails
            raise TuneError(f"must have a device that runs what is measured, got {error}") from error
    save(table, path)
    return path, table
