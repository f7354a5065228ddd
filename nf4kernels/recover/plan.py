"""The plan that loses least within a budget of bytes: what becomes of each layer, exactly, by integer programming."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # loads scipy.optimize where it is first used: 0.13 s, which only a plan is to cost
from torch import nn

from ..model.plan import replace_module
from ..model.quantize import quantize_model
from ..model.report import QuantizeReport
from ..model.walk import get_submodule
from ..storage.atomic import write_json
from .candidates import Candidate, aliases_of
from .sensitivity import Option, Sensitivities

VERSION = 1
SCALE = 1e6  # the largest cost that the solver sees: its absolute tolerance of 1e-6 is then 1e-12 of it


@dataclass(frozen=True)
class Plan(Mapping[str, "Mapping[str, Any] | None"]):
    """What becomes of each layer; as a mapping what `quantize_model(plan=)` takes: options, or None for dense.

    A layer that is to be dropped or to have a low rank is no matter of `quantize_model`, which says so: `apply_plan`
    does those, too.

    Attributes:
        layers: name -> its candidate.
        nbytes: of all the layers' weights then.
        weights: how many numbers these layers hold now.
        kl: the sum of the layers' KL, nats a row: what is expected of the plan if costs add up.
    """

    layers: Mapping[str, Candidate]
    nbytes: int
    weights: int
    kl: float

    @property
    def bits(self) -> float:
        """Bits a weight, scales, codebooks and adapters included, over the weights that the layers hold now."""
        return 8 * self.nbytes / self.weights

    @property
    def is_plain(self) -> bool:
        """Whether `quantize_model(plan=)` alone makes it."""
        return all(candidate.is_plain for candidate in self.layers.values())

    def __getitem__(self, name: str) -> Mapping[str, Any] | None:
        candidate = self.layers[name]
        if candidate.dropped:
            return {"dropped": True}
        options = None if candidate.options is None else dict(candidate.options)
        return options if candidate.rank is None else {**(options or {}), "rank": candidate.rank}

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def counts(self) -> dict[str, int]:
        """name of a candidate -> how many layers become it."""
        found: dict[str, int] = {}
        for candidate in self.layers.values():
            found[candidate.name] = found.get(candidate.name, 0) + 1
        return found

    def save(self, path: str | Path) -> None:
        """As JSON, whole or not at all."""
        layers = {name: candidate.as_dict() for name, candidate in self.layers.items()}
        head = {"version": VERSION, "nbytes": self.nbytes, "weights": self.weights, "bits": self.bits, "kl": self.kl}
        write_json(Path(path), head | {"layers": layers})

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """What `save` wrote; ValueError for a file that is none."""
        who = "nf4kernels.recover.Plan"
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            if fields["version"] != VERSION:
                raise ValueError(f"version {fields['version']}")
            layers = {name: Candidate.from_dict(candidate) for name, candidate in fields["layers"].items()}
            return cls(layers, int(fields["nbytes"]), int(fields["weights"]), float(fields["kl"]))
        except OSError as error:
            raise ValueError(f"{who}: path must be a file that can be read, got {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{who}: {path} must hold a plan, version {VERSION}, got {error!r}") from None


def make_plan(
    found: Sensitivities, bits: float | None = None, nbytes: int | None = None,
    seconds: Mapping[Option, float] | None = None, most_seconds: float = math.inf,
) -> Plan:  # fmt: skip
    """The choice of one option for every layer with the least sum of KL within a budget.

    minimize sum KL[o] x[o], x in {0, 1}, such that the options of each layer have sum x = 1 and sum bytes[o] x[o] is at
    most the budget: a multiple-choice knapsack, in which an option of several layers is a choice of all of them. By
    `scipy.optimize.milp` (HiGHS, branch and bound), to the optimum.

    Args:
        found: what each option costs; those with an infinite KL are left out.
        bits: the budget a weight, scales, codebooks and adapters included, over the weights that the layers hold now.
        nbytes: the budget in bytes, of the layers' weights alone; one of the two is given.
        seconds: what each of `found.options` takes, where time is to count too.
        most_seconds: the most that their sum may be.

    Raises:
        ValueError: not one budget is given, a KL is not known, or no plan is within the budget: the message has the
            least that one takes, in bytes, or in seconds within those bytes.
    """
    who = "nf4kernels.recover.make_plan"
    if (bits is None) == (nbytes is None):
        raise ValueError(f"{who}: bits or nbytes must be given, got {'neither' if bits is None else 'both'}")
    budget = int(nbytes if bits is None else bits * found.weights / 8)  # type: ignore[arg-type]  # one is given
    if any(math.isnan(option.kl) for option in found.options):
        raise ValueError(f"{who}: found must have every KL, got an unfinished one")
    times = None if seconds is None else seconds.__getitem__
    options = _undominated(found.options, times)
    known = {name for option in options for name in option.layers}
    for option in found.options:
        if not known.issuperset(option.layers):
            raise ValueError(f"{who}: found must have a finite KL for every layer, got none of {option.layers[0]}")
    limits = [Limit([option.nbytes for option in options], budget)]
    if times is not None and most_seconds < math.inf:
        limits.append(Limit([times(option) for option in options], most_seconds))
    chosen = solve(options, [option.kl for option in options], limits)
    if chosen is not None:
        return plan_of(chosen, found)
    smallest = _least(options, limits[0].sizes, [])
    if smallest > budget:
        words = f"{int(smallest)} bytes, {8 * smallest / found.weights:.4f} bits a weight"
        came = f"{budget} bytes, {8 * budget / found.weights:.4f} bits a weight"
        raise ValueError(f"{who}: the budget must be at least {words}, with these candidates, got {came}")
    quickest = _least(options, limits[1].sizes, limits[:1])
    raise ValueError(f"{who}: most_seconds must be at least {quickest:.3e} within these bytes, got {most_seconds:.3e}")


def _least(options: Sequence[Option], sizes: Sequence[float], limits: Sequence["Limit"]) -> float:
    """The smallest sum of sizes that a plan has; ValueError where there is no plan, whatever its size."""
    chosen = solve(options, sizes, limits)
    if chosen is None:
        raise ValueError("nf4kernels.recover.make_plan: found must have options for every layer, got layers with none")
    of = dict(zip(options, sizes))
    return math.fsum(of[option] for option in chosen)


def plan_of(chosen: Sequence[Option], found: Sensitivities) -> Plan:
    """The plan of one option for every layer."""
    layers = {name: option.candidate for option in chosen for name in option.layers}
    order = dict.fromkeys(name for option in found.options for name in option.layers)
    total = sum(option.nbytes for option in chosen)
    return Plan({name: layers[name] for name in order}, total, found.weights, math.fsum(o.kl for o in chosen))


@dataclass(frozen=True)
class Limit:
    """What the sum of some sizes, one an option, may be at most."""

    sizes: Sequence[float]
    most: float


def solve(options: Sequence[Option], costs: Sequence[float], limits: Sequence[Limit]) -> list[Option] | None:
    """Options that have every layer once, at the least sum of costs within the limits; None: there are none.

    The solver takes a sum for within a limit that is above it by 1e-6 of the largest size; then the limit is lowered by
    as much.
    """
    names = list(dict.fromkeys(name for option in options for name in option.layers))
    row = {name: index for index, name in enumerate(names)}
    places = [(row[name], column) for column, option in enumerate(options) for name in option.layers]
    rows, columns = np.array(places, dtype=np.int64).reshape(-1, 2).T
    cover = scipy.sparse.csr_array((np.ones(len(places)), (rows, columns)), shape=(len(names), len(options)))
    largest = max((abs(cost) for cost in costs), default=0.0) or 1.0
    objective = np.array(costs, dtype=np.float64) * (SCALE / largest)
    units = [max(limit.sizes, default=0.0) or 1.0 for limit in limits]
    most = [limit.most for limit in limits]
    while all(each >= 0 for each in most):
        constraints = [scipy.optimize.LinearConstraint(cover, 1, 1)]
        for limit, unit, each in zip(limits, units, most):
            sizes = np.array(limit.sizes, dtype=float)[None] / unit
            constraints.append(scipy.optimize.LinearConstraint(sizes, -np.inf, each / unit))
        done = scipy.optimize.milp(
            objective, integrality=np.ones(len(options)), bounds=scipy.optimize.Bounds(0, 1), constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if done.x is None:
            return None
        chosen = [index for index, x in enumerate(done.x) if x > 0.5]
        over = [math.fsum(limit.sizes[i] for i in chosen) - limit.most for limit in limits]
        if all(each <= 0 for each in over):
            return [options[index] for index in chosen]
        most = [each - max(excess, 0.0) for each, excess in zip(most, over)]
    return None


def _undominated(options: Sequence[Option], seconds: Callable[[Option], float] | None = None) -> list[Option]:
    """Without what another option of the same layers beats in bytes, KL and seconds, and without infinite KL."""
    of_layers: dict[tuple[str, ...], list[Option]] = {}
    for option in options:
        if math.isfinite(option.kl):
            of_layers.setdefault(option.layers, []).append(option)
    kept: list[Option] = []
    for group in of_layers.values():
        best: list[tuple[float, float]] = []  # (KL, seconds) of what has no more bytes
        for option in sorted(group, key=lambda each: (each.nbytes, each.kl)):
            own = (option.kl, 0.0 if seconds is None else seconds(option))
            if not any(kl <= own[0] and time <= own[1] for kl, time in best):
                kept.append(option)
                best.append(own)
    return kept


def apply_plan(model: nn.Module, plan: Plan, progress: bool = True, **quant_options: Any) -> QuantizeReport:
    """Make of a dense model what the plan says, in place: layers dropped and of low rank, then `quantize_model`.

    A layer of low rank becomes an nn.Sequential of two; a dropped one a `Dropped` without weights. Files of such a
    model load into one that was made the same way, on the meta device too.

    Raises:
        TypeError, ValueError: as `quantize_model`; for a layer that is none of the model's nothing is changed.
    """
    who = "nf4kernels.recover.apply_plan"
    aliases = dict(aliases_of(model))
    for name, candidate in plan.layers.items():
        if name not in aliases:
            raise ValueError(f"{who}: plan must name layers of the model, got {name!r}")
        if not candidate.is_plain and not isinstance(get_submodule(model, name), nn.Linear):
            kind = type(get_submodule(model, name)).__name__
            raise TypeError(f"{who}: {name} must be an nn.Linear to be {candidate.name}, got {kind}")
    options: dict[str, Mapping[str, Any] | None] = {}
    for name, candidate in plan.layers.items():
        if candidate.is_plain:
            options[name] = candidate.options
            continue
        dense = get_submodule(model, name)
        made = Candidate(rank=candidate.rank, dropped=candidate.dropped).layer(dense)
        replace_module(model, aliases[name], dense, made)
        if candidate.rank is not None:
            options.update({f"{name}.0": candidate.options, f"{name}.1": candidate.options})
    return quantize_model(model, progress=progress, plan=options, **quant_options)
