"""LoRA adapters on disk: PEFT's adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..autograd import outside_inference_mode
from ..model.plan import unwrapped
from ..model.walk import named_modules
from ..nn.casts import check_cast
from ..nn.lora import LoraConfig
from ..nn.quant_linear import QuantLinear
from .atomic import replacing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What this package gives a meaning to, and what has none once the adapter is trained: who made it, which layers were
# asked for (the tensors' names say which were given one), settings of other features. Any other entry must be unset.
READ = {
    "alpha_pattern", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "use_rslora",
}  # fmt: skip
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# The starts that leave the base weight alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it.
INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Adapter:
    """One layer's part of an adapter file."""

    config: LoraConfig
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]


def save_adapters(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters of all QuantLinear layers as PEFT does, for `PeftModel.from_pretrained` on the dense model.

    Layers may differ in rank and alpha; PEFT has one dropout and one rsLoRA setting for all. Tensors keep their dtype.
    Both files are complete or absent, each written under another name, flushed to disk and renamed.

    Args:
        model: a model that contains QuantLinear layers with adapters.
        directory: made where missing; `adapter_config.json` and `adapter_model.safetensors` in it are replaced.

    Raises:
        TypeError, ValueError: model is not a module, contains no adapter, or has adapters that PEFT cannot express.
        OSError: directory cannot be written.
    """
    who = "nf4kernels.save_adapters"
    model = unwrapped(model, "model", who)
    layers: dict[str, QuantLinear] = {}
    for name, layer in _layers(model).items():
        if layer.lora is not None and layer not in layers.values():  # PEFT, too, names a layer once
            layers[name] = layer
    if not layers:
        raise ValueError(f"{who}: model must have a QuantLinear with an adapter, got none")
    if "" in layers:
        raise ValueError(f"{who}: model must contain its layers, got a QuantLinear itself")
    config = _config(model, layers, who)
    tensors = {}
    for name, layer in sorted(layers.items()):
        for factor in ("lora_A", "lora_B"):
            weight = getattr(layer, factor).weight.detach()
            if weight.is_meta:
                raise ValueError(f"{who}: model must be loaded, got {name}.{factor} on the meta device")
            tensors[f"{PREFIX}{name}.{factor}.weight"] = weight.cpu().contiguous().clone()

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as weights, replacing(directory / CONFIG) as text:
        save_file(tensors, weights, {"format": "pt"})
        text.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@outside_inference_mode
def load_adapters(model: nn.Module, directory: str | Path) -> None:
    """Give the QuantLinear layers of `model` the adapters that PEFT or `save_adapters` wrote.

    A layer without an adapter gets one in the file's dtype; one that has an adapter of that rank keeps its parameters,
    whose values and scaling are replaced. All of them are left trainable.

    Args:
        model: a model that contains the QuantLinear layers that the file names.
        directory: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        TypeError, ValueError: model is not a module; a file is damaged; the adapter uses a feature that is not
            supported (DoRA, biases, further trained modules, ...); a layer is missing, unknown or of another shape or
            rank. The message names it, and the model is unchanged.
        OSError: a file is missing.
    """
    who = "nf4kernels.load_adapters"
    model = unwrapped(model, "model", who)
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{who}: directory must have {name}, got {directory}")
    config = _read_config(directory / CONFIG, who)
    adapters = _read_adapters(directory / WEIGHTS, config, who)
    layers = _layers(model)
    _check_fit(layers, adapters, who)
    for name, adapter in adapters.items():
        layer = layers[name]
        if layer.lora is None:
            layer.add_lora(adapter.config, dtype=adapter.A.dtype)
        layer.lora = adapter.config
        factors: Any = (layer.lora_A, layer.lora_B)
        for factor, stored in zip(factors, (adapter.A, adapter.B)):
            with torch.no_grad():
                factor.weight.copy_(stored)
            factor.requires_grad_(True)


def _layers(model: nn.Module) -> dict[str, QuantLinear]:
    """name -> layer under all its names, without what torch.compile puts into them."""
    return {name: module for name, module in named_modules(model) if isinstance(module, QuantLinear)}


def _config(model: nn.Module, layers: dict[str, QuantLinear], who: str) -> dict:
    """adapter_config.json's content."""
    configs = {name: layer.lora for name, layer in layers.items() if layer.lora is not None}
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
    return {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if first.init == "default" else first.init,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": first.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(model, set(layers)),
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "use_dora": False,
        "use_rslora": first.use_rslora,
    }


def _usual(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """(the commonest value, the others as a PEFT pattern that matches exactly its layer)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _target_modules(model: nn.Module, names: set[str]) -> list[str] | str:
    """PEFT's choice of exactly these layers: by last component, else by full name, else by a regular expression."""
    modules = {name for name, _ in named_modules(model)} - {""}
    outside = {m for m in modules if m.rpartition(".")[2] not in ("lora_A", "lora_B")} - names
    for targets in ({name.rpartition(".")[2] for name in names}, names):
        if not any(_matches(other, targets) for other in outside):
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(names))


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _read_config(file: Path, who: str) -> dict:
    try:
        config = json.loads(file.read_text())
        patterns = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
        usable = all(isinstance(pattern, dict) for pattern in patterns) and config["r"] and config["lora_alpha"]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{who}: {file} must hold PEFT's configuration in JSON, got {error!r}") from None
    if config.get("peft_type") != "LORA" or not usable:
        raise ValueError(f"{who}: peft_type in {file} must be 'LORA', with r and lora_alpha, got {config}")
    if config.get("init_lora_weights", True) not in INITS:
        came = config["init_lora_weights"]
        raise ValueError(f"{who}: init_lora_weights in {file} must leave the base weight as it is, got {came!r}")
    for name, value in config.items():
        unset = not value or (name, value) == ("bias", "none")
        if name not in READ | WITHOUT_EFFECT and not unset:
            raise ValueError(f"{who}: {name} in {file} must be unset, it is not supported; got {value!r}")
    return config


def _read_adapters(file: Path, config: dict, who: str) -> dict[str, _Adapter]:
    """layer name -> its adapter, checked against each other and the configuration."""
    factors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
                if match is None:
                    raise ValueError(f"{who}: {file} must hold {PREFIX}<layer>.lora_A|B.weight only, got {key}")
                factors.setdefault(match[1], {})[match[2]] = opened.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}") from None
    if not factors:
        raise ValueError(f"{who}: {file} must hold an adapter, got no tensor")
    adapters = {}
    for name, pair in factors.items():
        if len(pair) < 2:
            raise ValueError(f"{who}: {file} must hold lora_A and lora_B of {name}, got lora_{next(iter(pair))} alone")
        layer_config = _layer_config(config, name, file, who)
        A, B = pair["A"], pair["B"]
        r = layer_config.r
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != r or B.shape[1] != r:
            came = f"{list(A.shape)} and {list(B.shape)}"
            raise ValueError(f"{who}: lora_A and lora_B of {name} must be [{r}, K] and [N, {r}], got {came}")
        if not (A.is_floating_point() and B.is_floating_point()):
            raise ValueError(f"{who}: lora_A and lora_B of {name} must be floating point, got {A.dtype} and {B.dtype}")
        adapters[name] = _Adapter(layer_config, A, B)
    return adapters


def _layer_config(config: dict, name: str, file: Path, who: str) -> LoraConfig:
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


def _check_fit(layers: dict[str, QuantLinear], adapters: dict[str, _Adapter], who: str) -> None:
    """ValueError unless every adapter has its layer, and every layer that has an adapter is given one."""
    given = set()
    for name, adapter in adapters.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"{who}: model must have a QuantLinear as {name}, got none")
        if layer in given:
            raise ValueError(f"{who}: the file must have one adapter a layer, got a second one as {name}")
        given.add(layer)
        if (adapter.B.shape[0], adapter.A.shape[1]) != (layer.out_features, layer.in_features):
            came = [adapter.B.shape[0], adapter.A.shape[1]]
            raise ValueError(
                f"{who}: the adapter of {name} must be for {[layer.out_features, layer.in_features]}, got {came}"
            )
        if layer.lora is not None and layer.lora.r != adapter.config.r:
            raise ValueError(f"{who}: the adapter of {name} must have rank {layer.lora.r}, got {adapter.config.r}")
        if layer.lora is not None:
            factors: Any = (layer.lora_A, layer.lora_B)
            for factor, stored in zip(factors, (adapter.A, adapter.B)):
                check_cast(stored, factor.weight.dtype, f"{who}: the adapter of {name}")
        if layer.weight.is_meta:
            raise ValueError(f"{who}: model must be loaded, got {name} on the meta device")
    left = [name for name, layer in layers.items() if layer.lora is not None and layer not in given]
    if left:
        raise ValueError(f"{who}: the file must have an adapter for every layer that has one, got none for {left}")
