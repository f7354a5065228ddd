"""What each layer costs when only it is rounded: KL to the model itself, measured or from one backward pass."""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..model.plan import replace_module
from ..model.walk import get_submodule
from ..nn.quant_linear import QuantLinear
from ..storage.atomic import write_json
from .agreement import evaluating, summed_divergence
from .batches import Batch, counted_rows, logits_in, run
from .candidates import DROPPED, Candidate, aliases_of, default_candidates, layer_names
from .teacher_cache import fingerprint

WHO = "nf4kernels.recover.sensitivity"
VERSION = 1
INTERVAL = 1.0  # seconds between two writes of what is found, since those told by Fisher's information take less
Method = Literal["measured", "fisher", "scaled"]
METHODS = ("measured", "fisher", "scaled")


@dataclass(frozen=True)
class Option:
    """One thing that may become of one or several layers together.

    Attributes:
        layers: their names.
        nbytes: of all of them then.
        kl: KL(model || model with it alone), nats a row; NaN where it is not known yet.
    """

    layers: tuple[str, ...]
    candidate: Candidate
    nbytes: int
    kl: float = math.nan


@dataclass(frozen=True)
class Sensitivities:
    """Of a model's layers on some text.

    Attributes:
        weights: how many numbers the layers hold, each layer once.
        rows: predictions behind each KL, as tokens of the text.
        method: how the KL was found.
        options: in the model's order.
    """

    weights: int
    rows: int
    method: str
    options: tuple[Option, ...]

    def save(self, path: str | Path) -> None:
        """As JSON, whole or not at all."""
        write_json(Path(path), _as_dict(self, ""))

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivities":
        """What `save` or `sensitivity(path=)` wrote; ValueError for a file that is none, or unfinished."""
        found, _ = _read(Path(path))
        if not _is_finished(found):
            raise ValueError(f"nf4kernels.recover.Sensitivities: {path} must be finished, got one that is not")
        return found


def sensitivity(
    model: nn.Module,
    batches: Sequence[Batch],
    candidates: Sequence[Candidate] | None = None,
    groups: Iterable[Sequence[str]] = (),
    drops: Iterable[Sequence[str]] = (),
    skip: Sequence[str] = (),
    method: Method = "measured",
    path: str | Path | None = None,
    dense_dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivities:
    """KL(model || model with one layer changed) on `batches`, for each layer and candidate; nats a row.

    The model's logits are computed once and kept, `[rows, classes]` in its dtype. Its layers are changed one at a time
    and put back. Log-probabilities are in fp32, sums in fp64. A model in 16 bits rounds its activations, which alone
    gives a KL of 1e-3 or so after any change: have it in float32 for what is smaller than that.

    Methods: "measured" runs the batches for each layer and candidate. "fisher" runs them once, forward and backward,
    with labels drawn from the model's own predictions, and takes half the squared error weighted by the diagonal of
    the Fisher information, to which the KL of a small change is equal where errors of weights are independent. "scaled"
    measures the first candidate of each layer that is no dense one and takes the others' ratio to it from "fisher".
    Candidates that drop or have a low rank, and all of experts, are measured always.

    Args:
        model: dense, any that `batches` run; left as it was.
        batches: calibration text, a handful; see `batches.py`.
        candidates: what each layer may become; None is `default_candidates()`.
        groups: names of layers that get the same candidate, each layer in one group at most, as
            `layers_of_one_input` finds them.
        drops: names of layers that may be dropped together, as `blocks_of` finds them.
        skip: layers to leave out, as in `nf4kernels.quantize_model`.
        path: a JSON file, written after each measurement, at most once a second; what it holds already is not measured
            again.
        dense_dtype: of the weights as they are stored, whose bytes count; None is the model's.
        seed: of the labels that "fisher" draws.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the method is unknown, a name is none of a layer's or in two groups, there is no layer or no row,
            or `path` holds what is of another model, text or arguments.
    """
    candidates = default_candidates() if candidates is None else list(candidates)
    together = [tuple(group) for group in groups]
    droppable = [tuple(drop) for drop in drops]
    if method not in METHODS:
        raise ValueError(f"{WHO}: method must be one of {', '.join(METHODS)}, got {method!r}")
    layers = layer_names(model, skip)
    if not layers:
        raise ValueError(f"{WHO}: model must have a layer to quantize, got none")
    units = _units(layers, together, droppable)
    options = []
    for unit in units:
        for each in candidates:
            options.append(Option(unit, each, sum(each.nbytes(layers[name], dense_dtype) for name in unit)))
    options += [Option(drop, DROPPED, 0) for drop in droppable]
    with evaluating(model), torch.no_grad():
        references = [counted_rows(logits_in(run(model, batch)), batch) for batch in batches]
    rows = sum(map(len, references))
    if not rows:
        raise ValueError(f"{WHO}: batches must have rows that count, got none")
    if not all(reference.isfinite().all() for reference in references):
        raise ValueError(f"{WHO}: model must give finite logits on batches, got NaN or inf")
    weights = sum(parameter.numel() for layer in layers.values() for parameter in _weights(layer))
    found = Sensitivities(weights, rows, method, tuple(options))
    digest = _digest(model, batches, found, seed)
    if path is not None and Path(path).exists():
        found = _resumed(Path(path), digest)
    work = _Work(model, layers, batches, references, seed)
    written = -math.inf
    for so_far in work.through(found, progress):
        found = so_far
        if path is not None and (time.monotonic() - written >= INTERVAL or _is_finished(found)):
            write_json(Path(path), _as_dict(found, digest))
            written = time.monotonic()
    return found


class _Work:
    """What fills in the KL of options."""

    def __init__(self, model, layers, batches, references, seed) -> None:
        self.model, self.layers, self.batches, self.references, self.seed = model, layers, batches, references, seed
        self.aliases = dict(aliases_of(model))
        self._fisher: dict[str, Tensor] | None = None

    def through(self, found: Sensitivities, progress: bool) -> Iterator[Sensitivities]:
        """The same with one KL more after the other."""
        options = list(found.options)
        missing = [place for place, option in enumerate(options) if math.isnan(option.kl)]
        yield found
        with tqdm(total=len(options), initial=len(options) - len(missing), desc="sensitivity", unit="KL",
                  disable=not progress) as bar, evaluating(self.model):  # fmt: skip
            for place in missing:
                options[place] = replace(options[place], kl=self._kl(found.method, options, place))
                bar.update()
                yield replace(found, options=tuple(options))

    def _kl(self, method: str, options: Sequence[Option], place: int) -> float:
        option = options[place]
        if option.candidate.is_dense:
            return 0.0
        can_be_told = option.candidate.is_plain and all(type(self.layers[n]) is nn.Linear for n in option.layers)
        if method == "measured" or not can_be_told:
            return self.measured(option)
        if method == "fisher":
            return self.told(option)
        first = next(o for o in options if o.layers == option.layers and not o.candidate.is_dense)
        if first is option or not first.candidate.is_plain:
            return self.measured(option)
        expected = self.told(first)
        return first.kl * self.told(option) / expected if 0 < expected < math.inf else self.measured(option)

    @torch.no_grad()
    def measured(self, option: Option) -> float:
        with changed(self.model, dict.fromkeys(option.layers, option.candidate), self.aliases):
            return divergence(self.model, self.batches, self.references)

    def told(self, option: Option) -> float:
        """Half the squared error of the weights, weighted by the Fisher information, over the rows."""
        if self._fisher is None:
            self._fisher = fisher_diagonal(self.model, self.batches, self.layers, self.seed)
        total = 0.0
        for name in option.layers:
            dense = self.layers[name]
            rounded: Any = option.candidate.layer(dense)
            made = rounded.to_linear(torch.float32) if isinstance(rounded, QuantLinear) else rounded
            error = made.weight.detach().float() - dense.weight.detach().float()
            total += (error.square_() * self._fisher[name]).sum(dtype=torch.float64).item()
        return total / 2 / sum(map(len, self.references)) if math.isfinite(total) else math.inf


@contextmanager
def changed(
    model: nn.Module, chosen: dict[str, Candidate], aliases: dict[str, list[str]] | None = None
) -> Iterator[nn.Module]:
    """A `with` in which layers are what the candidates make of them; the dense ones are back after it."""
    aliases = dict(aliases_of(model)) if aliases is None else aliases
    dense = {name: get_submodule(model, name) for name in chosen}
    made = {name: candidate.layer(dense[name]) for name, candidate in chosen.items()}
    try:
        for name, layer in made.items():
            replace_module(model, aliases[name], dense[name], layer)
        yield model
    finally:
        for name, layer in dense.items():
            replace_module(model, aliases[name], layer, layer)


@torch.no_grad()
def divergence(model: nn.Module, batches: Sequence[Batch], references: Sequence[Tensor]) -> float:
    """KL(reference || model), nats a row, of logits `[rows, classes]` that another model had; fp32, summed in fp64."""
    total, rows = 0.0, 0
    for batch, reference in zip(batches, references):
        logits = counted_rows(logits_in(run(model, batch)), batch)
        rows += len(logits)
        total += summed_divergence(reference, logits)
    return max(total / rows, 0.0) if not math.isnan(total) else math.inf


def fisher_diagonal(
    model: nn.Module, batches: Iterable[Batch], layers: dict[str, nn.Module], seed: int = 0
) -> dict[str, Tensor]:
    """name -> fp32 `[N, K]`, the sum over all rows of E[(d log p(y) / dW)²], y drawn from the model's predictions.

    By the square of each batch's gradient: gradients of rows are independent and have mean zero, so that what they have
    in common vanishes in expectation. Two samples of a batch would halve the variance. Layers other than nn.Linear are
    left out.
    """
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items() if type(layer) is nn.Linear}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    with evaluating(model), _only_these_train(model, weights.values()):
        for number, batch in enumerate(batches):
            logits = counted_rows(logits_in(run(model, batch)), batch).float()
            generator = torch.Generator(logits.device).manual_seed(seed + number)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            functional.cross_entropy(logits, labels, reduction="sum").backward()
            for name, weight in weights.items():
                if weight.grad is not None:
                    sums[name] += weight.grad.float().square()
                    weight.grad = None
    return sums


@contextmanager
def _only_these_train(model: nn.Module, weights: Iterable[Any]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _units(layers: dict, groups: list[tuple[str, ...]], drops: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Each layer in one group, its own where none is said, in the model's order."""
    of_layer: dict[str, tuple[str, ...]] = {}
    for argument, each in [("groups", group) for group in groups] + [("drops", drop) for drop in drops]:
        for name in each:
            if name not in layers:
                raise ValueError(f"{WHO}: {argument} must name layers that can be quantized, got {name!r}")
            if argument == "groups" and name in of_layer:
                raise ValueError(f"{WHO}: groups must have each layer once, got {name!r} twice")
            if argument == "groups":
                of_layer[name] = each
    return list(dict.fromkeys(of_layer.get(name, (name,)) for name in layers))


def _weights(layer: nn.Module) -> list[Tensor]:
    return [parameter for parameter in layer.parameters() if parameter.dim() >= 2]


def _digest(model: nn.Module, batches: Sequence[Batch], found: Sensitivities, seed: int) -> str:
    """Of all that the KL depends on: the model, the text, options, method."""
    said = hashlib.blake2b(digest_size=16)
    plain = [[*option.layers, option.candidate.as_dict(), option.nbytes] for option in found.options]
    said.update(json.dumps([VERSION, found.method, seed, plain], sort_keys=True).encode())
    said.update(fingerprint(model).encode())
    tensors = []
    for batch in batches:
        values = batch.items() if isinstance(batch, Mapping) else [("", batch)] if isinstance(batch, Tensor) else [
            (str(i), value) for i, value in enumerate(batch)
        ]  # fmt: skip
        tensors += [value for _, value in values if isinstance(value, Tensor)]
    for tensor in tensors:
        said.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        said.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return said.hexdigest()


def _resumed(path: Path, digest: str) -> Sensitivities:
    found, theirs = _read(path)
    if theirs != digest:
        raise ValueError(
            f"{WHO}: path must hold measurements of the same model, text and arguments, or be a new file, got {path}"
            " of others"
        )
    return found


def _is_finished(found: Sensitivities) -> bool:
    return not any(math.isnan(option.kl) for option in found.options)


def _as_dict(found: Sensitivities, digest: str) -> dict[str, Any]:
    options = [
        {"layers": list(o.layers), "candidate": o.candidate.as_dict(), "nbytes": o.nbytes,
         "kl": None if math.isnan(o.kl) else o.kl}
        for o in found.options
    ]  # fmt: skip
    head = {"version": VERSION, "digest": digest, "weights": found.weights, "rows": found.rows}
    return head | {"method": found.method, "options": options}


def _read(path: Path) -> tuple[Sensitivities, str]:
    who = "nf4kernels.recover.Sensitivities"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["version"] != VERSION:
            raise ValueError(f"version {fields['version']}")
        options = tuple(
            Option(tuple(o["layers"]), Candidate.from_dict(o["candidate"]), int(o["nbytes"]),
                   math.nan if o["kl"] is None else float(o["kl"]))
            for o in fields["options"]
        )  # fmt: skip
        return Sensitivities(fields["weights"], fields["rows"], fields["method"], options), fields["digest"]
    except OSError as error:
        raise ValueError(f"{who}: path must be a file that can be read, got {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{who}: {path} must hold sensitivities, version {VERSION}, got {error!r}") from None
