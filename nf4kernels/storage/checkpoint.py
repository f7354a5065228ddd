"""A whole model's tensors on disk, in plain safetensors files."""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from ..autograd import outside_inference_mode
from ..model.memory import address, oddity
from ..model.plan import replace_module, unwrapped
from ..model.walk import get_submodule, named_modules, state_dict
from ..nn.casts import check_cast
from ..nn.lora import LoraConfig
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import BUFFERS, OTHER_BUFFERS, QuantModule
from ..quantized_weight import QuantizedWeight
from .atomic import replacing
from .bitsandbytes_format import names_of_weight, stored_weights, weight_from_tensors, weight_to_tensors
from .experts_format import stored_experts, take_experts
from .key_conversion import group_tensors

INDEX = "model.safetensors.index.json"
LORA_METADATA = "nf4kernels.lora"


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write all tensors of `model` to one safetensors file: QuantLinear weights by bitsandbytes' names, the rest as is.

    That includes QuantExperts, for which bitsandbytes has no format. Of tensors that share memory the first is written.
    Adapters are written with their configuration. The file is complete or absent: it is written under another name,
    flushed to disk and renamed.

    Args:
        model: any module.
        path: of the file; an existing one is replaced.

    Raises:
        TypeError, ValueError: model is not a module, is on the meta device, or has state that is not a tensor.
        OSError: path cannot be written.
    """
    who = "nf4kernels.save_checkpoint"
    model = unwrapped(model, "model", who)
    tensors, adapters = {}, {}
    layers = _quant_layers(model)
    expected = _dense_state(model, layers)
    for name, tensor in expected.items():
        came = _unwritable(tensor)
        if came is not None:
            raise ValueError(f"{who}: {name} in model's state must be a loaded tensor, got {came}")
    for module in model.modules():
        if isinstance(module, QuantModule) and not isinstance(module, QuantLinear):
            module.checked_weight()  # a QuantLinear's is checked with its qweight
    for group in _shared(expected):
        tensors[group[0]] = expected[group[0]]
    written = set()
    for name, layer in layers.items():
        if layer in written:
            continue
        written.add(layer)
        try:
            tensors.update(weight_to_tensors(layer.qweight, _join(name, "weight")))
        except ValueError as error:
            raise ValueError(f"{who}: layer {name}: {error}") from None
        if layer.lora is not None:
            adapters[name] = asdict(layer.lora)
    write_tensors(tensors, Path(path), {LORA_METADATA: json.dumps(adapters)} if adapters else {})


def _unwritable(tensor: Any) -> str | None:
    """What a value of a state is, where safetensors has no way to hold it."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    if tensor.is_meta:
        return "a meta tensor"
    return oddity(tensor) or (None if _is_storable(tensor.dtype) else f"one of {tensor.dtype}")


@cache
def _is_storable(dtype: torch.dtype) -> bool:
    try:
        save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, SafetensorError):
        return False
    return True


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, complete or absent; tensors are moved to the CPU, and copied where they share memory."""
    seen, owned = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with replacing(path) as partial:
        save_file(owned, partial, {"format": "pt", **(metadata or {})})


@outside_inference_mode
def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Fill `model` with a checkpoint written by `save_checkpoint`, `nf4kernels quantize`, or bitsandbytes.

    Where the file has a 4-bit weight, an nn.Linear of that shape becomes a QuantLinear and a QuantLinear takes over the
    file's codebook, block size and scales; fused experts become QuantExperts likewise. Adapters stored with their
    configuration are attached. Other tensors are copied into the model's, or put in their place where the model is on
    the meta device; buffers that no state dict holds (rotary embeddings' frequencies) stay on meta, and a warning names
    them. Where a file has other names than the model, or a matrix for each expert, it is read by the rules that
    transformers 5 has for that model.

    Args:
        model: a module with the checkpoint's names, or one that transformers has rules for; dense or quantized.
        path: a safetensors file, or a directory with `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        TypeError: model is not a module.
        ValueError: a file is damaged; names are missing or unknown; a tensor does not fit. The message names the file
            or the key, and the model is unchanged.
        OSError: path cannot be read.
    """
    who = "nf4kernels.load_checkpoint"
    model = unwrapped(model, "model", who)
    tensors, configs = {}, {}
    for file in checkpoint_files(Path(path), who):
        found, metadata = _read_file(file, who)
        tensors.update(found)
        configs.update(_lora_configs(metadata, file, who))
    qweights = {}
    for weight_key in stored_weights(tensors):
        names = names_of_weight(tensors, weight_key)
        parts = {name: tensors.pop(name).clone() for name in names}  # not views of the file
        try:
            qweights[weight_key.removesuffix("weight").removesuffix(".")] = weight_from_tensors(parts, weight_key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{who}: {path}: {error}") from None

    tensors, qweights = _converted(model, tensors, qweights, who)
    experts = take_experts(model, tensors, who)
    layers = _planned_layers(model, qweights, who)
    attach = {name: config for name, config in configs.items()
              if not isinstance(layers.get(name), QuantLinear) or layers[name].lora is None}  # fmt: skip
    expected = _dense_state(model, layers)
    for name, module in model.named_modules(remove_duplicate=False):
        if module in experts:
            for leaf in module._parameters:
                del expected[_join(name, leaf)]
    _check_dense(expected, tensors, layers, attach, who)
    for name, module in named_modules(model):
        if isinstance(module, QuantModule) and name not in layers:
            for message in module.state_errors(tensors, f"{name}."):
                raise ValueError(f"{who}: {path}: {message}")
    for dense, module in experts.items():
        aliases = [name for name, each in model.named_modules(remove_duplicate=False) if each is dense]
        replace_module(model, aliases, dense, module)
    _install(model, layers, qweights, attach, tensors)


def _converted(
    model: nn.Module, tensors: dict[str, Tensor], qweights: dict[str, QuantizedWeight], who: str
) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """What a file holds by the model's names and in its layouts; see `key_conversion`."""
    state = model.state_dict(keep_vars=True)
    packed = {_join(name, "weight"): qweight for name, qweight in qweights.items()}
    dense: dict[str, Tensor] = {}
    found: dict[str, QuantizedWeight] = {}
    for group in group_tensors(model, [*tensors, *packed], {*state, *stored_experts(state)}):
        sources = list(group.sources)
        in_4_bits = [name for name in sources if name in packed]
        if not in_4_bits:
            try:
                dense.update(group.convert(model, [tensors[name] for name in sources]))
            except Exception as error:  # what transformers' operations raise has no common type
                raise ValueError(f"{who}: {sources} must make {group.target}, got {error}") from None
        elif group.converter is None:
            found[group.target.removesuffix("weight").removesuffix(".")] = packed[in_4_bits[0]]
        else:
            raise ValueError(
                f"{who}: {in_4_bits[0]} must be dense, since the model has it inside of {group.target},"
                " got a 4-bit weight"
            )
    return dense, found


def checkpoint_files(path: Path, who: str) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, or those of a Hugging Face directory."""
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{who}: {index} must hold a weight_map in JSON, got {error!r}") from None
        missing = [name for name in names if not isinstance(name, str) or not (path / name).is_file()]
        if missing:
            raise ValueError(f"{who}: {index} must name files that exist, got {missing[0]}")
        return [path / name for name in names]
    if not (path / "model.safetensors").exists():
        raise ValueError(f"{who}: path must have model.safetensors or its index, got {path}")
    return [path / "model.safetensors"]


def _read_file(file: Path, who: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise FileNotFoundError(f"{who}: path must be a safetensors file or a directory, got {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}") from None


def _lora_configs(metadata: dict[str, str], file: Path, who: str) -> dict[str, LoraConfig]:
    try:
        return {name: LoraConfig(**fields) for name, fields in json.loads(metadata.get(LORA_METADATA, "{}")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{who}: {LORA_METADATA} in {file} must hold adapter configurations, got {error}") from None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """name -> layer, under all its names."""
    return {name: module for name, module in named_modules(model) if isinstance(module, QuantLinear)}


def _dense_state(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The model's state without the weights of `layers`, nor what a file need not hold."""
    state = state_dict(model)
    for name in layers:
        for key in ("weight", *OTHER_BUFFERS, *BUFFERS):
            state.pop(_join(name, key), None)
    for name, module in named_modules(model):
        if isinstance(module, QuantModule):
            state.pop(_join(name, "checksum"), None)
    return state


def _shared(state: dict[str, Tensor]) -> Iterator[list[str]]:
    """Groups of names whose tensors are the same memory."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        view = None if oddity(tensor) else (tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault((address(tensor), view), []).append(name)
    yield from groups.values()


def _planned_layers(model: nn.Module, qweights: dict[str, QuantizedWeight], who: str) -> dict[str, nn.Module]:
    """name -> the layer that will hold that 4-bit weight, under all names; checked against the checkpoint."""
    modules: dict[str, Any] = dict(named_modules(model))
    chosen = {}
    for name, qweight in qweights.items():
        layer: Any = modules.get(name)
        fits = isinstance(layer, QuantLinear) or (type(layer) is nn.Linear and name != "")
        if not fits:
            came: Any = "no such layer" if layer is None else type(layer).__name__
            raise ValueError(f"{who}: model must have a Linear or QuantLinear as {name or 'its root'}, got {came}")
        if (layer.out_features, layer.in_features) != qweight.shape:
            came = [layer.out_features, layer.in_features]
            raise ValueError(f"{who}: {_join(name, 'weight')} must have shape {came}, got {list(qweight.shape)}")
        chosen[layer] = name
    planned = {name: layer for name, layer in modules.items() if layer in chosen}
    for name, layer in modules.items():
        if isinstance(layer, QuantLinear) and layer not in chosen:
            raise ValueError(f"{who}: the checkpoint must have a 4-bit weight {_join(name, 'weight')}, got none")
    return planned


def _check_dense(expected, tensors, layers, attach: dict[str, LoraConfig], who: str) -> None:
    """ValueError unless `tensors` are those of `expected` (one of each shared group) and of the adapters to attach."""
    shapes = {}
    for name, config in attach.items():
        if name not in layers:
            raise ValueError(f"{who}: model must have a 4-bit layer {name} for its adapter, got none")
        shapes[_join(name, "lora_A.weight")] = (config.r, layers[name].in_features)
        shapes[_join(name, "lora_B.weight")] = (layers[name].out_features, config.r)
    missing = [name for name in shapes if name not in tensors]
    for group in _shared(expected):
        shapes.update({name: tuple(expected[name].shape) for name in group})
        if not any(name in tensors for name in group):
            missing.append(group[0])
    unknown = [name for name in tensors if name not in shapes]
    if missing or unknown:
        raise ValueError(f"{who}: the checkpoint must have the model's names, missing {missing}, unknown {unknown}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{who}: {name} must have shape {list(shapes[name])}, got {list(tensor.shape)}")
        if name in expected and not expected[name].is_meta:
            check_cast(tensor, expected[name].dtype, f"{who}: {name}")


def _install(model: nn.Module, layers: Mapping[str, Any], qweights, attach, tensors) -> None:
    names: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(layer, []).append(name)
    for layer, aliases in names.items():
        name = next(alias for alias in aliases if alias in qweights)
        device = "cpu" if layer.weight.is_meta else layer.weight.device
        was = None if layer.weight.is_meta else getattr(layer, "dense_dtype", layer.weight.dtype)
        if isinstance(layer, QuantLinear):
            new = layer
            layer.set_qweight(qweights[name].to(device))
        else:
            new = QuantLinear.from_quantized(qweights[name].to(device), layer.bias).train(layer.training)
            replace_module(model, aliases, layer, new)
        new.cast_to = was  # as the model around it, whatever the file was
    for name, config in attach.items():
        stored = tensors[_join(name, "lora_A.weight")].dtype
        adapted: Any = get_submodule(model, name)
        adapted.add_lora(config, dtype=stored)

    state, placed = state_dict(model), {}
    for name, tensor in tensors.items():
        target = state[name]
        if target.is_meta:
            trainable = isinstance(target, nn.Parameter) and target.requires_grad
            tensor = tensor.clone()  # not a view of the file
            placed[id(target)] = nn.Parameter(tensor, trainable) if isinstance(target, nn.Parameter) else tensor
        else:
            target.data.copy_(tensor)
    for module in model.modules() if placed else ():
        for store in (module._parameters, module._buffers):
            store.update({leaf: placed[id(t)] for leaf, t in store.items() if id(t) in placed})
    for module in model.modules():
        if isinstance(module, QuantModule) and not isinstance(module, QuantLinear):
            module.record_bytes()  # a QuantLinear has taken its weight over
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        message = f"nf4kernels.load_checkpoint: still on the meta device, since no checkpoint holds them: {left}"
        warnings.warn(message, stacklevel=3)
