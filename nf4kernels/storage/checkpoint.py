"""A whole model's tensors on disk, in plain safetensors files."""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model.plan import replace_module, unwrapped
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import BUFFERS, QuantModule
from ..quantized_weight import QuantizedWeight
from .atomic import replacing
from .bitsandbytes_format import names_of_weight, stored_weights, weight_from_tensors, weight_to_tensors
from .checkpoint_adapters import adapter_metadata, attach, check_active, missing_adapters, stored_adapters
from .names import Fit, fit_of_whole, left_behind, listed, never_stored, renamed_head

INDEX = "model.safetensors.index.json"


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write all tensors of `model` to one safetensors file: QuantLinear weights by bitsandbytes' names, the rest as is.

    That includes QuantExperts, for which bitsandbytes has no format; such a file loads where a model has them already.
    Of tensors that share memory the first is written. Adapters are written with their configuration. The file is
    complete or absent: it is written under another name, flushed to disk and renamed.

    Args:
        model: any module.
        path: of the file; an existing one is replaced.

    Raises:
        TypeError, ValueError: model is not a module, is on the meta device, or has state that is not a tensor.
        OSError: path cannot be written.
    """
    who = "nf4kernels.save_checkpoint"
    model = unwrapped(model, "model", who)
    tensors = {}
    layers = _quant_layers(model)
    expected = _dense_state(model, layers)
    for name, tensor in expected.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            came = "a meta tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{who}: {name} in model's state must be a loaded tensor, got {came}")
    for group in _shared(expected):
        tensors[group[0]] = expected[group[0]]
    written: dict[QuantLinear, str] = {}
    for name, layer in layers.items():
        if layer in written:
            continue
        written[layer] = name
        try:
            tensors.update(weight_to_tensors(layer.qweight, _join(name, "weight")))
        except ValueError as error:
            raise ValueError(f"{who}: layer {name}: {error}") from None
    write_tensors(tensors, Path(path), adapter_metadata({name: layer for layer, name in written.items()}))


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


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Fill `model` with a checkpoint written by `save_checkpoint`, `nf4kernels quantize`, or bitsandbytes.

    Where the file has a 4-bit weight, an nn.Linear of that shape becomes a QuantLinear and a QuantLinear takes over the
    file's codebook, block size and scales. QuantExperts are filled, but must be in the model already. Adapters stored
    with their configuration are attached. Other tensors are copied into the model's, or put in their place where the
    model is on the meta device; buffers that no state dict holds (rotary embeddings' frequencies) stay on meta, and a
    warning names them. Such buffers in the file are ignored.

    The file may be of a larger model around this one, or of the part of it that lacks the head: then one prefix makes
    the names fit, and a warning names the tensors that were left out, in the file or in the model. Where the model ties
    two tensors and the file holds two different ones, they are untied, which a warning says, too.

    Args:
        model: a module with the checkpoint's names, dense or quantized.
        path: a safetensors file, or a directory with `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        TypeError: model is not a module.
        ValueError: a file is damaged; names are missing or unknown; a tensor does not fit. The message names the file
            or the key, and the model is unchanged.
        OSError: path cannot be read.
    """
    who = "nf4kernels.load_checkpoint"
    model = unwrapped(model, "model", who)
    tensors, metadata = {}, {}
    for file in checkpoint_files(Path(path), who):
        found, words = _read_file(file, who)
        tensors.update(found)
        metadata.update(stored_adapters(words, file, who))
    qweights = {}
    for weight_key in stored_weights(tensors):
        names = names_of_weight(tensors, weight_key)
        parts = {name: tensors.pop(name).clone() for name in names}  # not views of the file
        try:
            qweights[weight_key.removesuffix("weight").removesuffix(".")] = weight_from_tensors(parts, weight_key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{who}: {path}: {error}") from None

    for name in never_stored(model, tensors):
        del tensors[name]
    fit, outside = _rename(model, tensors, qweights, metadata)
    for name in left_behind(model, tensors):
        del tensors[name]
    layers = _planned_layers(model, qweights, fit, who)
    check_active(layers, metadata, who)
    missing = missing_adapters(layers, metadata)
    expected = _dense_state(model, layers)
    left = _check_dense(expected, tensors, layers, missing, fit, who)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantModule) and name not in layers:
            for message in module.state_errors(tensors, f"{name}."):
                raise ValueError(f"{who}: {path}: {message}")
    untied = _untied(model, expected, tensors, who)
    _install(model, layers, qweights, missing, tensors, untied)
    for name, other in untied.items():
        undone = "what ties them again (tie_weights, config.tie_word_embeddings) would drop it"
        message = f"{name} is no longer tied to {other}, since the file holds another tensor for it; {undone}"
        warnings.warn(f"{who}: {message}", stacklevel=2)
    if left:
        warnings.warn(f"{who}: the file is of a part of the model, left as they were: {listed(left)}", stacklevel=2)
    if outside:
        warnings.warn(f"{who}: the model is a part of the file's, not loaded: {listed(outside)}", stacklevel=2)


def _rename(model: nn.Module, tensors: dict[str, Tensor], qweights: dict[str, QuantizedWeight],
            metadata: dict[str, Any]) -> tuple[Fit, list[str]]:  # fmt: skip
    """Give all three the model's names, in place; (how, the names of tensors that have none)."""
    layers = _quant_layers(model)
    aliases: dict[QuantLinear, list[str]] = {}
    for name, layer in layers.items():
        aliases.setdefault(layer, []).append(_join(name, "weight"))
    groups = [*_shared(_dense_state(model, layers)), *aliases.values()]
    of_adapters = {key for layer, adapters in metadata.items() for each in adapters for key in each.keys(layer)}
    fit = fit_of_whole({*tensors, *(_join(name, "weight") for name in qweights)} - of_adapters, groups)
    outside: list[str] = []
    for store in (tensors, qweights, metadata):
        named: Any = store  # three kinds of values
        values = {(fit(name), name): named.pop(name) for name in list(named)}
        named.update({name: value for (name, _), value in values.items() if name is not None})
        outside += [old for name, old in values if name is None]
    of_adapters = {key for layer, adapters in metadata.items() for each in adapters for key in each.keys(layer)}
    head = renamed_head(model, {*tensors, *(_join(name, "weight") for name in qweights)} - of_adapters, groups)
    if head is not None:
        theirs, ours = head
        for store in (tensors, qweights, metadata):
            named = store
            for name in [name for name in named if f"{name}.".startswith(f"{theirs}.")]:
                named[ours + name[len(theirs) :]] = named.pop(name)
    return fit, outside


def checkpoint_files(path: Path, who: str) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, or those of a Hugging Face directory."""
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{who}: {index} must hold a weight_map in JSON, got {error!r}") from None
        missing = [name for name in names if not (path / name).is_file()]
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


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """name -> layer, under all its names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, QuantLinear)}


def _dense_state(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The model's state without the weights of `layers`."""
    state = model.state_dict(keep_vars=True)
    for name in layers:
        for key in ("weight", "source_dtype", *BUFFERS):
            state.pop(_join(name, key), None)
    return state


def _shared(state: dict[str, Tensor]) -> Iterator[list[str]]:
    """Groups of names whose tensors are the same memory."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        address = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault(address, []).append(name)
    yield from groups.values()


def _planned_layers(model: nn.Module, qweights: dict[str, QuantizedWeight], fit: Fit, who: str) -> dict[str, nn.Module]:
    """name -> the layer that will hold that 4-bit weight, under all names; checked against the checkpoint."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
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
        if isinstance(layer, QuantLinear) and layer not in chosen and name.startswith(fit.added):
            raise ValueError(f"{who}: the checkpoint must have a 4-bit weight {_join(name, 'weight')}, got none")
    return planned


def _check_dense(expected, tensors, layers, missing_lora, fit: Fit, who: str) -> list[str]:
    """ValueError unless `tensors` are those of `expected` (one of each shared group) and of the adapters to attach.

    Returns the names that a file of a part of the model does not hold.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, adapters in missing_lora.items():
        if name not in layers:
            raise ValueError(f"{who}: model must have a 4-bit layer {name} for its adapter, got none")
        for adapter in adapters:
            factors = (adapter.config.r, layers[name].in_features), (layers[name].out_features, adapter.config.r)
            shapes.update(zip(adapter.keys(name), factors))
    missing = [name for name in shapes if name not in tensors]
    left: list[str] = []
    for group in _shared(expected):
        shapes.update({name: tuple(expected[name].shape) for name in group})
        if not any(name in tensors for name in group):
            (missing if group[0].startswith(fit.added) else left).append(group[0])
    unknown = [name for name in tensors if name not in shapes]
    if missing or unknown:
        raise ValueError(f"{who}: the checkpoint must have the model's names, missing {missing}, unknown {unknown}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{who}: {name} must have shape {list(shapes[name])}, got {list(tensor.shape)}")
    return left


def _untied(model: nn.Module, expected: dict[str, Tensor], tensors: dict[str, Tensor], who: str) -> dict[str, str]:
    """name -> the name it is tied to in the model, where the file holds different values for the two."""
    untied = {}
    for group in _shared(expected):
        first, *others = [name for name in group if name in tensors] or [""]
        for name in others:
            dtype = expected[name].dtype
            if torch.equal(tensors[name].to(dtype), tensors[first].to(dtype)):
                continue
            (owner, leaf), (first_owner, _) = _owner(model, name), _owner(model, first)
            if owner is first_owner or leaf not in owner._parameters:
                raise ValueError(
                    f"{who}: {first} and {name} are tied in the model and cannot be untied, so the file must hold the"
                    " same for both, got two different tensors"
                )
            untied[name] = first
    return untied


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _install(model: nn.Module, layers: Mapping[str, Any], qweights, missing_lora, tensors, untied) -> None:
    names: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(layer, []).append(name)
    for layer, aliases in names.items():
        name = next(alias for alias in aliases if alias in qweights)
        device = "cpu" if layer.weight.is_meta else layer.weight.device
        if isinstance(layer, QuantLinear):
            layer.set_qweight(qweights[name].to(device))
        else:
            new = QuantLinear.from_quantized(qweights[name].to(device), layer.bias).train(layer.training)
            replace_module(model, aliases, layer, new)
    for name, adapters in missing_lora.items():
        adapted: Any = model.get_submodule(name)
        attach(adapted, adapters, {key: tensors[key].dtype for each in adapters for key in each.keys(name)}, name)
    for name in untied:
        owner, leaf = _owner(model, name)
        tied: Any = owner._parameters[leaf]
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(tied, requires_grad=False), tied.requires_grad)

    state, placed = model.state_dict(keep_vars=True), {}
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
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        message = f"nf4kernels.load_checkpoint: still on the meta device, since no checkpoint holds them: {left}"
        warnings.warn(message, stacklevel=3)
