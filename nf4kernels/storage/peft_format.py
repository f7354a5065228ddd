"""PEFT's adapter files: what their configuration says, how their tensors are called."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..nn.lora import LoraConfig
from .bin_files import read_bin

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# What this package gives a meaning to; what has none once the adapter is trained: who made it, which layers were asked
# for (the tensors' names say which were given one), settings of other features; and what changes the product.
READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_parameters", "use_rslora",
}  # fmt: skip
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
UNSUPPORTED = {
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
}  # fmt: skip
# The starts that leave the base weight alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it.
INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class StoredLora:
    """One layer's part of an adapter file."""

    config: LoraConfig
    A: Tensor  # [r, K], of experts [E, r, K]
    B: Tensor  # [N, r], of experts [E, N, r]


def peft_config(
    model: nn.Module, configs: Mapping[str, LoraConfig], parameters: Collection[str], others: Collection[str],
    saved: list[str], bias: str, who: str,
) -> dict[str, Any]:  # fmt: skip
    """adapter_config.json's content.

    Args:
        configs: layer, or parameter of experts -> its adapter's configuration.
        parameters: those of configs that are experts'.
        others: names of all modules of the dense model, and of all experts' parameters, that have no adapter.
        saved: PEFT's modules_to_save; bias: PEFT's word for which biases are in the file.
    """
    for setting in ("dropout", "use_rslora"):
        values = {getattr(config, setting) for config in configs.values()}
        if len(values) > 1:
            raise ValueError(f"{who}: {setting} must be the same in every layer for PEFT, got {sorted(values)}")
    ranks: dict[str, float] = {name: config.r for name, config in configs.items()}
    alphas: dict[str, float] = {
        name: int(a) if a == int(a) else a for name, a in ((n, c.alpha) for n, c in configs.items())
    }
    r, rank_pattern = _usual(ranks)
    alpha, alpha_pattern = _usual(alphas)
    first = next(iter(configs.values()))
    if parameters and first.dropout:
        message = "PEFT has no dropout beside adapters on experts, lora_dropout is written as 0"
        warnings.warn(f"{who}: {message}, got {first.dropout}", stacklevel=3)
    layers = set(configs) - set(parameters)
    return {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if first.init == "default" else first.init,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0 if parameters else first.dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(layers, others) if layers else [],
        "target_parameters": _target_parameters(set(parameters), others) if parameters else None,
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "use_dora": False,
        "use_rslora": first.use_rslora,
    }


def _usual(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """(the commonest value, the others as a PEFT pattern that matches exactly its layer)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _target_modules(names: set[str], others: Collection[str]) -> list[str] | str:
    """PEFT's choice of exactly these layers: by last component, else by full name, else by a regular expression."""
    for targets in ({name.rpartition(".")[2] for name in names}, names):
        if not any(_matches(other, targets) for other in others):
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(names))


def _target_parameters(names: set[str], others: Collection[str]) -> list[str]:
    """The same for parameters, which are called by their module's name and their own at least."""
    short = {".".join(name.split(".")[-2:]) for name in names}
    return sorted(names if any(_matches(other, short) for other in others) else short)


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def adapter_weights(directory: Path, who: str, called: str = "ADAPTER") -> Path:
    """An adapter's file of tensors; ValueError, in which `directory` is `called`, where that or CONFIG is missing."""
    weights = directory / (WEIGHTS if (directory / WEIGHTS).is_file() else OLD_WEIGHTS)
    for file, expected in ((directory / CONFIG, CONFIG), (weights, WEIGHTS)):
        if not file.is_file():
            raise ValueError(f"{who}: {called} must be a directory of PEFT's with {expected}, got {directory}")
    return weights


def read_config(file: Path, who: str, known: Collection[str] = ()) -> dict[str, Any]:
    """The configuration, if it is of a LoRA without what changes the product in a way that this package does not know.

    Of an unknown field a value that means "not used" is passed over, a word or a number is warned of, and a switch that
    is on, or settings, are refused. `known`: further fields that the caller gives a meaning to.
    """
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        patterns = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
        usable = all(isinstance(pattern, dict) for pattern in patterns) and config["r"]
        usable = usable and isinstance(config["lora_alpha"], int | float)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{who}: {file} must hold PEFT's configuration in JSON, got {error!r}") from None
    if config.get("peft_type") != "LORA" or not usable:
        raise ValueError(f"{who}: peft_type in {file} must be 'LORA', with r and lora_alpha, got {config}")
    if config.get("init_lora_weights", True) not in INITS:
        came = config["init_lora_weights"]
        raise ValueError(f"{who}: init_lora_weights in {file} must leave the base weight as it is, got {came!r}")
    for name, value in config.items():
        if not value or name in known or name in READ | WITHOUT_EFFECT:
            continue
        if name in UNSUPPORTED or value is True or not isinstance(value, str | int | float):
            raise ValueError(f"{who}: {name} in {file} must be unset, it is not supported; got {value!r}")
        warnings.warn(f"{who}: {name} in {file} is not known here and was ignored, got {value!r}", stacklevel=3)
    return config


def read_tensors(
    file: Path, config: dict[str, Any], who: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(layer -> lora_A and lora_B as they are stored, name -> what was trained beside them)."""
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    adapter_names = set()
    for key, tensor in read_stored_tensors(file, who).items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.([^.]+))?\.weight", key)
        if match is not None:
            factors.setdefault(match[1], {})[match[2]] = tensor
            adapter_names.add(match[3])
        elif key.startswith(PREFIX):
            others[key[len(PREFIX) :].replace(".base_layer.", ".")] = tensor
        else:
            raise ValueError(f"{who}: {file} must hold {PREFIX}<layer>.lora_A|B.weight and the like only, got {key}")
    if not factors:
        raise ValueError(f"{who}: {file} must hold an adapter, got {'other tensors only' if others else 'no tensor'}")
    if len(adapter_names) > 1:
        raise ValueError(f"{who}: {file} must hold one adapter, got {sorted(map(str, adapter_names))}")
    _check_others(config, others, file, who)
    adapters = {}
    for name, pair in factors.items():
        if len(pair) < 2:
            raise ValueError(f"{who}: {file} must hold lora_A and lora_B of {name}, got lora_{next(iter(pair))} alone")
        A, B = pair["A"], pair["B"]
        if not (A.is_floating_point() and B.is_floating_point()):
            raise ValueError(f"{who}: lora_A and lora_B of {name} must be floating point, got {A.dtype} and {B.dtype}")
        adapters[name] = A, B
    return adapters, others


def stored_lora(
    config: dict[str, Any], name: str, A: Tensor, B: Tensor, file: Path, who: str, experts: int = 1
) -> StoredLora:
    """The adapter of a layer, or of `experts` in two matrices still, checked against the configuration."""
    found = layer_config(config, name, file, who)
    r = found.r * experts
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != r or B.shape[1] != r:
        came = f"{list(A.shape)} and {list(B.shape)}"
        raise ValueError(f"{who}: lora_A and lora_B of {name} must be [{r}, K] and [N, {r}], got {came}")
    return StoredLora(found, A, B)


def read_stored_tensors(file: Path, who: str) -> dict[str, Tensor]:
    if file.name == WEIGHTS:
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}") from None
    return read_bin(file, who)


def _check_others(config: dict[str, Any], others: Collection[str], file: Path, who: str) -> None:
    """ValueError where the configuration announces tensors that the file does not hold."""
    for module in config.get("modules_to_save") or ():
        if not any(module.rpartition(".")[2] in name.split(".") for name in others):
            raise ValueError(f"{who}: modules_to_save in {file} must be in the file, got {module!r}, which is not")
    bias = config.get("bias") or "none"
    if bias != "none" and not any(name.rpartition(".")[2] == "bias" for name in others):
        raise ValueError(f"{who}: bias in {file} must be 'none' where the file holds none, got {bias!r}")


def layer_config(config: dict[str, Any], name: str, file: Path, who: str) -> LoraConfig:
    """A layer's configuration: as in PEFT, by the first pattern that matches the end of its name, else the general."""
    found = {}
    for setting, general, patterns in (("r", "r", "rank_pattern"), ("alpha", "lora_alpha", "alpha_pattern")):
        found[setting] = config[general]
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                found[setting] = value
                break
    dropout, rslora = config.get("lora_dropout", 0.0), bool(config.get("use_rslora", False))
    init = "gaussian" if config.get("init_lora_weights") == "gaussian" else "default"
    try:
        return LoraConfig(**found, dropout=dropout, use_rslora=rslora, init=init)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: the settings of {name} in {file} must make a LoraConfig, got {error}") from None
