"""The adapters of a checkpoint: their settings in the file's metadata, their tensors by the names of a state dict."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..nn.adapted_module import AdaptedModule
from ..nn.lora import FROM_WEIGHT, LoraConfig

ACTIVE = "nf4kernels.lora"  # layer -> settings of its active adapter
SEVERAL = "nf4kernels.adapters"  # layer -> {"active": name or null, "waiting": {name: settings}}, unless one "default"


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter of a layer in a file."""

    name: str
    config: LoraConfig
    active: bool

    def keys(self, layer: str) -> tuple[str, ...]:
        """Of lora_A and lora_B, and of what these started from where that was the weight."""
        inside = "" if self.active else f"{AdaptedModule.WAITING}.{self.name}."
        start = f"{layer}.{inside}" if layer else inside
        leaves = ("weight", "start") if self.config.init in FROM_WEIGHT else ("weight",)
        return tuple(f"{start}{factor}.{leaf}" for leaf in leaves for factor in ("lora_A", "lora_B"))


def adapter_metadata(layers: Mapping[str, AdaptedModule]) -> dict[str, str]:
    """What a safetensors file says of the layers' adapters; nothing where there are none."""
    active, several = {}, {}
    for path, layer in layers.items():
        if layer.lora is not None:
            active[path] = asdict(layer.lora)
        if layer.adapter_names not in ([], ["default"]) or (layer.lora is None and layer.adapter_names):
            name = None if layer.lora is None else layer.adapter_name
            waiting: dict[str, Any] = {each: layer.get_adapter(each) for each in layer.adapter_names if each != name}
            several[path] = {"active": name, "waiting": {each: asdict(found[0]) for each, found in waiting.items()}}
    entries = ((ACTIVE, active), (SEVERAL, several))
    return {key: json.dumps(entry) for key, entry in entries if entry}


def stored_adapters(metadata: Mapping[str, str], file: Path, who: str) -> dict[str, list[StoredAdapter]]:
    """layer -> its adapters, the active one first."""
    found: dict[str, list[StoredAdapter]] = {}
    try:
        several = json.loads(metadata.get(SEVERAL, "{}"))
        for path, fields in json.loads(metadata.get(ACTIVE, "{}")).items():
            name = several[path]["active"] if path in several else "default"
            found[path] = [StoredAdapter(name, LoraConfig(**fields), True)]
        for path, entry in several.items():
            adapters = [StoredAdapter(name, LoraConfig(**fields), False) for name, fields in entry["waiting"].items()]
            found.setdefault(path, []).extend(adapters)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{who}: {ACTIVE} in {file} must hold adapter configurations, got {error}") from None
    return found


def check_active(layers: Mapping[str, Any], stored: Mapping[str, list[StoredAdapter]], who: str) -> None:
    """ValueError where a layer has another active adapter than the file: the tensors' names would be another's."""
    for path, adapters in stored.items():
        layer = layers.get(path)
        if not isinstance(layer, AdaptedModule) or not layer.adapter_names:
            continue
        ours = None if layer.lora is None else layer.adapter_name
        theirs = next((each.name for each in adapters if each.active), None)
        if ours != theirs:
            raise ValueError(
                f"{who}: {path} must have the active adapter {theirs!r} that the file has (set_adapter), got {ours!r}"
            )


def missing_adapters(
    layers: Mapping[str, Any], stored: Mapping[str, list[StoredAdapter]]
) -> dict[str, list[StoredAdapter]]:
    """Those that a layer does not have yet."""
    missing = {}
    for path, adapters in stored.items():
        layer = layers.get(path)
        names = layer.adapter_names if isinstance(layer, AdaptedModule) else []
        missing[path] = [each for each in adapters if each.name not in names]
    return {path: adapters for path, adapters in missing.items() if adapters}


def attach(
    layer: AdaptedModule, adapters: list[StoredAdapter], dtypes: Mapping[str, torch.dtype], path: str
) -> None:  # fmt: skip
    has_active = layer.lora is not None or any(each.active for each in adapters)
    for each in adapters:
        layer.attach_lora(each.config, dtypes[each.keys(path)[0]], each.name)
    if not has_active:
        layer.set_adapter(None)
