"""Which matrices of a Hugging Face checkpoint are linear layers to quantize."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..model.heads import left_dense_by_loader
from ..model.plan import plan_layers, skips
from ..nn.experts_layout import weight_names

# Only where there is no model to ask: matrices that are not linear layers by these names.
NOT_LINEAR = ("*embed*", "*wte", "*wpe", "*shared", "*norm*", "*relative_attention_bias*", "*conv*")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass
class Choice:
    """The layers to quantize; the linear layers left dense, for the loader; why matrices were left; who said so.

    Attributes:
        unknown: those that the model, where it chose, does not have.
    """

    layers: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    source: str = ""
    unknown: list[str] = field(default_factory=list)


def choose(
    model: nn.Module | None,
    source: str,
    config: Mapping[str, Any],
    matrices: Collection[str],
    skip: Iterable[str],
    block_size: int = 64,
) -> Choice:
    """Sort the checkpoint's matrices, given by the names of their layers, into quantized and dense.

    The model, on the meta device, says which are linear layers and experts; without one their names say what is linear.
    `source` says in words whose choice it is. ValueError for a model whose names do not tell.
    """
    if model is None:
        return _choose_by_name(source, config, matrices, skip)
    return _choose_by_model(model, source, matrices, skip, block_size)


def _choose_by_model(
    model: nn.Module, source: str, matrices: Collection[str], skip: Iterable[str], block_size: int
) -> Choice:
    targets, skipped = plan_layers(model, skip, block_size)
    wanted, experts = set(), set()
    for name in (name for names in targets for name in names):
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            wanted.add(name)
        else:
            experts |= {f"{name}.{leaf}" for leaf in weight_names(module)}
    wanted |= experts
    linear = [name for name, module in model.named_modules()
              if type(module) is nn.Linear or type(module).__name__ == "Conv1D"]  # fmt: skip
    choice = Choice(source=source)
    choice.layers = [name for name in matrices if name in wanted]
    choice.reasons = {entry.name: entry.reason for entry in skipped if entry.name in matrices}
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    choice.unknown = [name for name in matrices if name not in known]
    choice.reasons.update(dict.fromkeys(choice.unknown, f"not a module of {source}"))
    choice.dense = [name for name in linear if name not in choice.layers]
    kept_dtype = getattr(model, "_keep_in_fp32_modules", None) or ()
    while clash := [
        name for name in choice.layers
        if name not in experts and left_dense_by_loader(name, [*choice.dense, *kept_dtype])
    ]:  # fmt: skip
        choice.layers = [name for name in choice.layers if name not in clash]
        choice.dense += clash
        choice.reasons.update(dict.fromkeys(clash, "transformers would load it as dense"))
    return choice


def _choose_by_name(source: str, config: Mapping[str, Any], matrices: Collection[str], skip: Iterable[str]) -> Choice:
    if config.get("model_type") in CONV1D_MODELS:
        raise ValueError(
            f"{config['model_type']} keeps its weights transposed, which only transformers can tell apart;"
            f" layers were to be chosen by {source}"
        )
    choice = Choice(source=source)
    for name in matrices:
        pattern = next((p for p in NOT_LINEAR if fnmatchcase(name.lower(), p)), None)
        reason = None if pattern is None else "not linear by name"
        for entry in skip:
            if skips(entry, name):
                reason = f"skip={entry!r}"
        if reason is None:
            choice.layers.append(name)
        else:
            choice.reasons[name] = reason
            choice.dense.append(name)
    return choice
