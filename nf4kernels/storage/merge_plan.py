"""How the tensors of a base become the merged ones: what PEFT's adapter has for each, by its names in the files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.plan import is_conv1d
from ..nn.casts import cast
from ..quantized_weight import WEIGHT_DTYPES
from .dense_tensors import DenseTensors
from .directory_checks import Words
from .matrices import Header, Unit, units_of
from .merge_experts import AdaptedExperts, adapted_experts
from .names import Fit, fit_of_part
from .peft_experts import wrapped_module
from .peft_format import CONFIG, StoredLora, adapter_weights, read_config, read_tensors, stored_lora
from .shards import Source

ENDS_OF_MODELS = {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out"}  # which models may tie


@dataclass(frozen=True)
class Adapter:
    config: dict[str, Any]
    file: Path  # of the configuration
    factors: dict[str, tuple[Tensor, Tensor]]  # lora_A and lora_B, by the names of layers, and of experts
    others: dict[str, Tensor]  # what was trained whole, by the model's names of tensors
    fan_in_fan_out: bool  # of layers that no model tells of
    is_kept_tied: bool


@dataclass
class Plan:
    """How the tensors of a base become the merged ones, by their names in its files."""

    dense: DenseTensors
    loras: dict[str, StoredLora] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    conv1d: set[str] = field(default_factory=set)  # weights that files have as [in, out]
    untied: dict[str, str] = field(default_factory=dict)  # new tensor -> the one that it was tied to
    is_untied: bool = False
    repeated: set[str] = field(default_factory=set)  # what the adapter holds again under a tied name
    experts: list[AdaptedExperts] = field(default_factory=list)
    of_experts: dict[str, AdaptedExperts] = field(default_factory=dict)  # by the files' names

    def sources(self) -> list[Source]:
        names = [*self.dense.names, *self.untied]
        return [(name, self.dense.on_meta(self._stored(name)), self.read) for name in names]

    def read(self, name: str) -> Tensor:
        """The merged tensor: the sum in fp32, rounded once, as PEFT does it."""
        if name in self.of_experts:
            return self.of_experts[name].read(name, self.dense)
        stored = self._stored(name)
        dtype, packed = self.dense.on_meta(stored).dtype, stored in self.dense.packed
        if name in self.others and name not in self.loras:
            return cast(self.others[name], dtype, f"the adapter's {name}")
        if name not in self.loras:
            weight = self.dense.read(stored)
            return weight.t() if packed and name in self.conv1d else weight
        if name in self.others:  # PEFT stores the weight under an adapter of the output layer, too
            weight = cast(self.others[name], dtype, f"the adapter's {name}")
        else:
            weight = self.dense.read(stored, torch.float32)
        delta = self.delta(name)
        if name in self.conv1d and not packed:
            delta = delta.t()
        merged = cast(delta.add_(weight), dtype, f"the merged {name}")
        if not all(bound.isfinite() for bound in merged.aminmax()):
            raise ValueError(f"the merged {name} must be finite, got {'nan' if merged.isnan().any() else 'inf'}")
        return merged.t() if name in self.conv1d and packed else merged

    def delta(self, name: str) -> Tensor:
        """scaling * B @ A, fp32 [N, K]."""
        lora = self.loras[name]
        return (lora.B.float() @ lora.A.float()).mul_(lora.config.scaling)

    def _stored(self, name: str) -> str:
        return self.untied.get(name, name)


def read_adapter(directory: Path, who: str) -> Adapter:
    weights = adapter_weights(directory, who)
    config = read_config(directory / CONFIG, who, ("fan_in_fan_out",))
    factors, others = read_tensors(weights, config, who)
    unknown = next((name for name in others if ".lora_" in f".{name}"), None)
    if unknown is not None:
        raise ValueError(f"{who}: ADAPTER must be of linear layers and experts alone, got {unknown}")
    tied = bool(config.get("ensure_weight_tying"))
    return Adapter(config, directory / CONFIG, factors, others, bool(config.get("fan_in_fan_out")), tied)


def make_plan(
    dense: DenseTensors, adapter: Adapter, model: nn.Module | None, config: Mapping[str, Any], words: Words
) -> Plan:
    """What becomes of each tensor; ValueError where the adapter has what base has not, or in another shape."""
    who, base = words.who, words.in_dir
    units = _units(model, dense)
    in_file = {unit.group.target: unit.headers[0].name for unit in units if unit.group.converter is None}
    paths = {name for name, _ in model.named_modules()} if model is not None else {layer_of(n) for n in in_file}
    fit = fit_of_part(
        [*{wrapped_module(path)[0]: None for path in adapter.factors}, *adapter.others], {*in_file, *paths}
    )
    plan = Plan(dense)
    loras = _loras(plan, adapter, model, units, fit, who)
    touched = {f"{fit(name) or name}.weight": lora for name, lora in loras.items()}
    whole = {fit(name) or name: tensor for name, tensor in adapter.others.items()}
    _untie(plan, in_file, {*touched, *whole}, model, adapter.is_kept_tied, who)
    modules = {} if model is None else dict(model.named_modules(remove_duplicate=False))
    for name in sorted({*touched, *whole} - plan.repeated):
        key = in_file.get(name, name if name in plan.untied else None)
        if key is None:
            raise ValueError(f"{who}: {base} must have the tensor {name}, which the adapter is for, got none")
        stored = plan.untied.get(key, key)
        meta = dense.on_meta(stored)
        shape = tuple(meta.shape)
        if name in whole:
            plan.others[key] = whole[name]
            _check_shape(tuple(whole[name].shape), shape, name, words)
        if name in touched:
            if meta.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{who}: {name} in {base} must be float32, bfloat16 or float16, got {meta.dtype}")
            transposed = is_conv1d(modules[layer_of(name)]) if layer_of(name) in modules else adapter.fan_in_fan_out
            plan.loras[key] = touched[name]
            came = (touched[name].B.shape[0], touched[name].A.shape[1])
            _check_shape(came, shape[::-1] if transposed and stored not in dense.packed else shape, name, words)
    named = {in_file[f"{n}.weight"] for n, m in modules.items() if is_conv1d(m) and f"{n}.weight" in in_file}
    of_adapter = set(plan.loras) if model is None and adapter.fan_in_fan_out else set()
    plan.conv1d = named | of_adapter
    return plan


def _check_shape(came: tuple[int, ...], shape: tuple[int, ...], name: str, words: Words) -> None:
    if came != shape:
        raise ValueError(
            f"{words.who}: {name} must have shape {list(shape)} as in {words.in_dir}, the adapter's is {list(came)}"
        )


def layer_of(name: str) -> str:
    return name.removesuffix(".weight")


def _units(model: nn.Module | None, dense: DenseTensors) -> list[Unit]:
    """What the model makes of the files' tensors; without one each stands for itself."""
    metas = {name: dense.on_meta(name) for name in dense.names}
    return units_of(model, [Header(name, tuple(meta.shape), meta.dtype) for name, meta in metas.items()])


def _loras(
    plan: Plan, adapter: Adapter, model: nn.Module | None, units: list[Unit], fit: Fit, who: str
) -> dict[str, StoredLora]:
    """The linear layers' adapters; those of experts are put into the plan."""
    factors = adapter.factors
    if adapter.config.get("target_parameters"):
        if model is None:
            raise ValueError(
                f"{who}: transformers must be installed and know the model to merge an adapter of its experts"
                " (target_parameters)"
            )
        plan.experts, taken = adapted_experts(factors, model, units, fit, adapter.config, adapter.file, who)
        plan.of_experts = {name: each for each in plan.experts for name in each.names}
        factors = {path: pair for path, pair in factors.items() if path not in taken}
    return {path: stored_lora(adapter.config, path, A, B, adapter.file, who) for path, (A, B) in factors.items()}


def _untie(
    plan: Plan, in_file: Mapping[str, str], touched: set[str], model: nn.Module | None, is_kept: bool, who: str
) -> None:
    """Give each of several names that the model ties its own tensor where the adapter changes one of them.

    Written into `plan.untied`; a name of the model that the file has not is written under that name.
    """
    if model is None:
        missing = ENDS_OF_MODELS - {layer_of(name).rpartition(".")[2] for name in in_file}
        ends = sorted(name for name in touched if layer_of(name).rpartition(".")[2] in ENDS_OF_MODELS)
        if ends and "lm_head" in missing:
            raise ValueError(
                f"{who}: transformers must be installed and know the model to tell whether {ends[0]} is tied"
            )
        return
    groups: dict[int, list[str]] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        changed = touched.intersection(names)
        stored = [name for name in names if name in in_file]
        if len(names) < 2 or not changed or not stored:
            continue
        if not is_kept:
            plan.is_untied = True
            plan.untied |= {name: in_file[stored[0]] for name in names if name not in in_file}
        elif stored[0] in changed:
            plan.repeated |= changed - {stored[0]}
        else:
            raise ValueError(f"{who}: the adapter must hold {stored[0]}, to which the model ties {min(changed)}")
