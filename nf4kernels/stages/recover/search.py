"""An evolutionary search for plans by what they measure: KL on a text, and seconds on this device, within bytes.

The sum of the layers' KL that `make_plan` minimizes is an estimate; a plan's own KL is one run of the text. NSGA-II
(Deb et al. 2002, by optuna) mixes plans, from the exact ones of several limits of time on.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

from ...recover.candidates import Candidate
from ...recover.plan import Plan, make_plan, plan_of
from ...recover.sensitivity import Option, Sensitivities
from ..errors import StageError

POPULATION = 16
STARTS = 4  # limits of time whose exact plans the search begins with
ROTATED = 32 << 20  # bytes of equal layers that a product is timed over, so that no cache holds them all
LEAST = 0.05  # seconds that each product is timed for
OVER = "over"


@dataclass(frozen=True)
class Found:
    """A plan, the KL that was measured of it, and the seconds of its products."""

    plan: Plan
    kl: float
    seconds: float


@torch.no_grad()
def product_seconds(
    layers: Mapping[str, nn.Module], found: Sensitivities, device: torch.device, dtype: torch.dtype,
    progress: bool = True,
) -> dict[Option, float]:  # fmt: skip
    """option -> seconds of its layers' products for one token, each shape and candidate measured on the device.

    The least of several medians' samples, over as many equal layers as no cache holds; 0 for what is dropped. Layers
    that are no nn.Linear are a StageError.
    """
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise StageError(f"--milliseconds must be of linear layers alone, got a {type(layer).__name__} as {name}")
    wanted = {
        (tuple(layers[name].weight.shape), option.candidate)  # type: ignore[arg-type,union-attr]
        for option in found.options for name in option.layers
    }  # fmt: skip
    times: dict[tuple[Any, Candidate], float] = {}
    for shape, candidate in tqdm(sorted(wanted, key=str), desc="time", unit="product", disable=not progress):
        times[shape, candidate] = 0.0 if candidate.dropped else _seconds(shape, candidate, device, dtype)
    return {
        option: sum(times[tuple(layers[name].weight.shape), option.candidate] for name in option.layers)  # type: ignore
        for option in found.options
    }  # fmt: skip


def _seconds(shape: tuple[int, int], candidate: Candidate, device: torch.device, dtype: torch.dtype) -> float:
    N, K = shape
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
    dense.weight.copy_(torch.randn(N, K, generator=generator) / K**0.5)
    first = candidate.layer(dense)
    copies = min(max(1, ROTATED // max(candidate.nbytes(dense), 1)), 256)
    rotated = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
    x = torch.randn(1, K, generator=generator).to(device, dtype)
    timer = Timer("for layer in rotated: layer(x)", globals={"rotated": rotated, "x": x})
    return min(timer.blocked_autorange(min_run_time=LEAST).times) / copies


def search(
    found: Sensitivities, start: Plan, budget: int, seconds: Mapping[Option, float] | None, most_seconds: float,
    measured: Callable[[Plan], float], trials: int, seed: int = 0, storage: Path | None = None, progress: bool = True,
) -> list[Found]:  # fmt: skip
    """Every plan within the budget that was tried, by KL and seconds; `start` is the first.

    Args:
        found: what `make_plan` takes.
        start: its plan.
        budget: in bytes, of the layers' weights.
        seconds: of each option; None leaves time out.
        most_seconds: for the starts; what a plan takes is for the caller to judge.
        measured: a plan's KL.
        trials: how many plans to measure, those of an earlier run in `storage` among them.
        seed: of the draws; a run that was stopped goes on with other draws than one that was not.
        storage: a file that is appended to.
        progress: show a progress bar on stderr.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = _Space(found)
    sampler = optuna.samplers.NSGAIISampler(
        population_size=POPULATION, seed=seed, constraints_func=lambda trial: (trial.user_attrs[OVER],)
    )
    keep = None if storage is None else JournalStorage(JournalFileBackend(str(storage)))
    said = repr([(option.layers, option.candidate.name, option.kl) for option in found.options])
    digest = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
    name = f"{budget} bytes, {digest}, {'KL' if seconds is None else 'KL and seconds'}, seed {seed}"
    study = optuna.create_study(
        storage=keep, sampler=sampler, study_name=name, directions=["minimize"] * (1 if seconds is None else 2),
        load_if_exists=True,
    )  # fmt: skip
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    known = [trial.params for trial in done]
    known += [trial.system_attrs["fixed_params"] for trial in study.trials if trial.state == TrialState.WAITING]
    for plan in _starts(found, start, budget, seconds, most_seconds):
        if space.values_of(plan) not in known:
            study.enqueue_trial(space.values_of(plan))

    def objective(trial: optuna.Trial) -> float | tuple[float, float]:
        chosen = space.chosen({n: trial.suggest_categorical(n, labels) for n, labels in space.variables.items()})
        plan = plan_of(chosen, found)
        trial.set_user_attr(OVER, plan.nbytes - budget)
        # a plan that is too large is measured for nothing: what is expected of it ranks it as well
        kl = measured(plan) if plan.nbytes <= budget else plan.kl
        return kl if seconds is None else (kl, sum(seconds[option] for option in chosen))

    with tqdm(total=trials, initial=len(done), desc="search", unit="plan", disable=not progress) as bar:
        study.optimize(objective, max(trials - len(done), 0), callbacks=[lambda study, trial: bar.update()])
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]  # others were interrupted
    return [_found(trial, space, found) for trial in complete if trial.user_attrs[OVER] <= 0]


def _found(trial: FrozenTrial, space: "_Space", found: Sensitivities) -> Found:
    plan = plan_of(space.chosen(trial.params), found)
    return Found(plan, trial.values[0], trial.values[1] if len(trial.values) > 1 else 0.0)


def _starts(
    found: Sensitivities, start: Plan, budget: int, seconds: Mapping[Option, float] | None, most_seconds: float
) -> list[Plan]:
    """`start`, and exact plans of less bytes, or of less time where time counts."""
    plans = [start]
    chosen = {(names, candidate) for names, candidate in _as_options(start, found)}
    taken = sum(time for option, time in (seconds or {}).items() if (option.layers, option.candidate) in chosen)
    for part in range(1, STARTS):
        share = 1 - 0.05 * part
        try:
            if seconds is None:
                plans.append(make_plan(found, nbytes=int(budget * share)))
            else:
                plans.append(make_plan(found, nbytes=budget, seconds=seconds, most_seconds=taken * share))
        except ValueError:  # there is none
            break
    return plans


def _as_options(plan: Plan, found: Sensitivities) -> list[tuple[tuple[str, ...], Candidate]]:
    return [
        (option.layers, option.candidate) for option in found.options
        if all(plan.layers[name] == option.candidate for name in option.layers)
    ]  # fmt: skip


class _Space:
    """Plans as categories: a candidate for each group of layers, and whether each set of them is dropped.

    What is dropped, the larger sets first, overrules the layers' own.
    """

    def __init__(self, found: Sensitivities) -> None:
        self.options: dict[str, dict[str, Option]] = {}
        self.drops: dict[str, Option] = {}
        for option in found.options:
            if option.candidate.dropped:
                self.drops[f"drop {option.layers[0]} and {len(option.layers) - 1}"] = option
            elif math.isfinite(option.kl):
                self.options.setdefault(f"{option.layers[0]}", {})[option.candidate.name] = option
        self.variables: dict[str, Sequence[Any]] = {name: list(each) for name, each in self.options.items()}
        self.variables.update({name: [False, True] for name in self.drops})

    def chosen(self, values: Mapping[str, Any]) -> list[Option]:
        dropped: set[str] = set()
        options = []
        for name, option in sorted(self.drops.items(), key=lambda pair: -len(pair[1].layers)):
            if values[name] and not dropped & set(option.layers):
                options.append(option)
                dropped |= set(option.layers)
        return options + [
            each[values[name]] for name, each in self.options.items() if not dropped & set(each[values[name]].layers)
        ]

    def values_of(self, plan: Plan) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, each in self.options.items():
            first = next(iter(each.values())).layers[0]
            values[name] = plan.layers[first].name if plan.layers[first].name in each else next(iter(each))
        dropped: set[str] = set()
        for name, option in sorted(self.drops.items(), key=lambda pair: -len(pair[1].layers)):
            values[name] = all(plan.layers[n].dropped and n not in dropped for n in option.layers)
            dropped |= set(option.layers) if values[name] else set()
        return values
