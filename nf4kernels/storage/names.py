"""Names in a file and names in a model that differ by one prefix, or in the head's: which stands for which."""

import re
from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Fit:
    """How a file's names become the model's: `taken` away in front, or `added` there; at most one is not empty."""

    taken: str = ""
    added: str = ""

    def __call__(self, name: str) -> str | None:
        """The model's name; None for a name without what is to be taken away: it is of a part that the model lacks."""
        return self.added + name[len(self.taken) :] if name.startswith(self.taken) else None


def fit_of_part(found: Collection[str], wanted: Set[str]) -> Fit:
    """For a file that may name a part of the model: every found name must be among the wanted ones.

    Neither none that fits nor one of several is a guess worth making: the names then stay as they are.
    """
    if wanted >= set(found):
        return Fit()
    components = min(found).split(".")
    fits = [Fit(taken=".".join(components[:count]) + ".") for count in range(1, len(components))]
    fits += [Fit(added=prefix) for prefix in _prefixes([min(found)], wanted)]
    fits = [fit for fit in fits if all(fit(name) in wanted for name in found)]
    return fits[0] if len(fits) == 1 else Fit()


def fit_of_whole(found: Set[str], groups: Collection[Collection[str]]) -> Fit:
    """For a file that holds a whole model: of a larger one around this one, or of the part of it without its head.

    Args:
        groups: the model's names; names of one group are of one tensor, so one of them is enough.
    """
    every = {name for group in groups for name in group}
    if not found or not groups or every >= found or all(not found.isdisjoint(group) for group in groups):
        return Fit()
    added = _one_prefix([[name] for name in found], every)
    if added is not None:
        return Fit(added=added)
    return Fit(taken=_one_prefix(groups, found) or "")


def _one_prefix(groups: Iterable[Collection[str]], names: Set[str]) -> str | None:
    """The one prefix that makes a name of every group one of `names`; None if none or several do."""
    groups = list(groups)
    fitting = [prefix for prefix in _prefixes(groups[0], names)
               if all(any(prefix + name in names for name in group) for group in groups)]  # fmt: skip
    return fitting[0] if len(fitting) == 1 else None


def _prefixes(endings: Iterable[str], names: Set[str]) -> set[str]:
    return {name.removesuffix(ending) for ending in endings for name in names if name.endswith(f".{ending}")}


def renamed_head(model: nn.Module, found: Set[str], groups: Collection[Collection[str]]) -> tuple[str, str] | None:
    """(file's name, model's name) of the output layer where that alone is missing, and one other layer too many."""
    missing = [next(iter(group)) for group in groups if found.isdisjoint(group)]
    unknown = found - {name for group in groups for name in group}
    owners = ({name.rpartition(".")[0] for name in names} for names in (unknown, missing))
    leaves = [{name.rpartition(".")[2] for name in names} for names in (unknown, missing)]
    try:
        (theirs,), (ours,) = owners
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (ValueError, AttributeError, NotImplementedError, TypeError):
        return None
    is_head = head is not None and theirs and ours and head is dict(model.named_modules()).get(ours)
    return (theirs, ours) if is_head and leaves[0] == leaves[1] else None


def never_stored(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of `names` that are of buffers which the model computes, also where they once were in another module.

    By the last two components of the names of its buffers that no state dict holds: "rotary_emb.inv_freq".
    """
    stored = model.state_dict(keep_vars=True).keys()
    tails = {_tail(name) for name, _ in model.named_buffers() if name not in stored} - {_tail(name) for name in stored}
    return {name for name in names if _tail(name) in tails}


def left_behind(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of `names` that older classes had and the model has not, by the patterns of transformers' models."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    stored = model.state_dict(keep_vars=True).keys() if patterns else ()
    return {name for name in names if name not in stored and any(re.search(pattern, name) for pattern in patterns)}


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def listed(names: Collection[str], most: int = 8) -> str:
    """Names for a message, the first few of many."""
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
