"""From the names and layouts that a Hugging Face file has to those of the model's modules, by transformers' own rules.

transformers keeps for each of its models how `from_pretrained` renames a file's tensors, and which of them it stacks,
concatenates or cuts: Mixtral's file has a matrix for each expert, its module two 3-D weights. The rules are taken from
where the model came from. This module imports no transformers: whoever has such a model has imported it.
"""

import copy
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Group:
    """Tensors of a file that become tensors of the model together.

    Attributes:
        sources: name in the file -> the pattern of transformers' converter that it matched, "" where there is none.
        target: the model's name, or the first of several.
        converter: transformers' converter; None where a name changes at most.
    """

    sources: dict[str, str]
    target: str
    converter: Any = field(default=None, repr=False)

    @property
    def is_renamed(self) -> bool:
        return list(self.sources) != [self.target]

    def convert(self, model: nn.Module | None, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's tensors by their names, of those of the file in the order of `sources`; may be on meta."""
        if self.converter is None:
            return {self.target: tensors[0]}
        converter = copy.deepcopy(self.converter)
        for (name, pattern), tensor in zip(self.sources.items(), tensors):
            converter.add_tensor(self.target, name, pattern, tensor)
        converted = converter.convert(self.target, model=model, config=getattr(model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def group_tensors(model: nn.Module | None, names: Iterable[str], known: Collection[str]) -> list[Group]:
    """Every one of a file's `names` in a group; by the names alone. `known`: the model's own.

    A file whose names are all known is the model's as it is. A name that no rule makes a known one keeps itself.
    """
    names = list(names)
    rules = None if model is None or all(name in known for name in names) else _rules(model)
    if model is None or rules is None:
        return [Group({name: ""}, name) for name in names]
    loading, transforms = rules
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    state = dict.fromkeys(known, True)
    groups: dict[str, Group] = {}
    # in the order of the numbers in them: a converter stacks experts as they come
    for name in sorted(names, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state:
            target, pattern = name, None
        if pattern is not None:
            group = groups.setdefault(target, Group({}, target, by_pattern[pattern]))
            group.sources[name] = pattern
        elif target in groups:  # two names for one tensor: the first has it
            groups[name] = Group({name: ""}, name)
        else:
            groups[target] = Group({name: ""}, target)
    return list(groups.values())


def put_back(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of a file that transformers' `save_pretrained` would write of the model's tensor `name`."""
    rules = _rules(model)
    found: dict[str, Tensor] = {name: tensor}
    return found if rules is None else rules[0].revert_weight_conversion(model, found)


def take_apart(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """`put_back`, with a check that these tensors become `tensor` again; ValueError where they do not."""
    found = put_back(model, name, tensor)
    groups = group_tensors(model, found, model.state_dict(keep_vars=True))
    again = groups[0].convert(model, [found[each] for each in groups[0].sources]) if len(groups) == 1 else {}
    if name not in again or not torch.equal(again[name], tensor):
        raise ValueError(f"{name} must be put together again from {min(found)} and the like by transformers' rules")
    return found


def _rules(model: nn.Module) -> tuple[Any, list[Any]] | None:
    """(transformers.core_model_loading, its rules for the model); None for what is no model of a transformers 5."""
    modeling, mapping, loading = (
        sys.modules.get(f"transformers.{name}")
        for name in ("modeling_utils", "conversion_mapping", "core_model_loading")
    )
    if modeling is None or mapping is None or loading is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    return loading, mapping.get_model_conversion_mapping(model)
