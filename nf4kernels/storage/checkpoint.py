"""A whole model's tensors on disk, in plain safetensors files."""

import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from ..autograd import outside_inference_mode
from ..model.memory import address, oddity
from ..model.plan import is_conv1d, linear_shape, replace_module, unwrapped
from ..model.walk import get_submodule, named_modules, state_dict
from ..nn.adapted_module import AdaptedModule
from ..nn.casts import check_cast
from ..nn.experts_layout import weight_names
from ..nn.grouped_quant_linear import GroupedQuantLinear
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import OF_WEIGHT, QuantLinear
from ..nn.quant_module import QuantModule
from ..nn.released import check_gathered
from ..quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from .atomic import replacing
from .bitsandbytes_format import names_of_weight, stored_weights, weight_from_tensors, weight_to_tensors
from .checkpoint_adapters import adapter_metadata, attach, check_active, missing_adapters, stored_adapters
from .experts_format import name_experts, stored_experts, take_experts
from .key_conversion import group_tensors
from .names import Fit, fit_of_whole, left_behind, listed, never_stored, renamed_head
from .published.opening import open_published
from .tensor_files import checkpoint_files


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
    check_gathered(model.named_parameters(), who)
    tensors = {}
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
    written: dict[QuantLinear, str] = {}
    for name, layer in layers.items():
        if layer in written:
            continue
        written[layer] = name
        try:
            tensors.update(weight_to_tensors(layer.qweight, _join(name, "weight")))
        except ValueError as error:
            raise ValueError(f"{who}: layer {name}: {error}") from None
    adapted: dict[str, AdaptedModule] = {name: layer for layer, name in written.items()}
    adapted.update(_adapted_experts(model))
    write_tensors(tensors, Path(path), adapter_metadata(adapted))


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
    """Fill `model` with a checkpoint of `save_checkpoint`, `nf4kernels quantize` or bitsandbytes, or a published one.

    A published one is a directory in MXFP4, NVFP4 or symmetric INT4 (`quant_method` mxfp4, modelopt,
    compressed-tensors, gptq or auto-round in its config.json), or a GGUF file with Q4_0 and IQ4_NL. Its codes and
    scales are taken as they are, whatever their layout, and nothing is rounded.

    Where the file has a 4-bit weight, an nn.Linear of that shape (or GPT-2's Conv1D) becomes a QuantLinear, and a
    QuantLinear takes over the file's codebook, block size and scales; fused experts become QuantExperts likewise.
    Adapters stored with their configuration are attached. Other tensors are copied into the model's, or put in their
    place where the model is on the meta device; buffers that no state dict holds (rotary embeddings' frequencies) stay
    on meta, and a warning names them. Such buffers in the file are ignored. Where a file has other names than the
    model, or a matrix for each expert, it is read by the rules that transformers 5 has for that model.

    The file may be of a larger model around this one, or of the part of it that lacks the head: then one prefix makes
    the names fit, and a warning names the tensors that were left out, in the file or in the model. Where the model ties
    two tensors and the file holds two different ones, they are untied, which a warning says, too.

    Args:
        model: a module with the checkpoint's names, or one that transformers has rules for; dense or quantized.
        path: a safetensors file, a directory with `model.safetensors` or `model.safetensors.index.json`, a GGUF file.

    Raises:
        TypeError: model is not a module.
        ValueError: a file is damaged, or in a published layout that is not read; names are missing or unknown; a tensor
            does not fit. The message names the file or the key, and the model is unchanged.
        OSError: path cannot be read.
    """
    who = "nf4kernels.load_checkpoint"
    model = unwrapped(model, "model", who)
    tensors, metadata = _read(Path(path), model, who)
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
    name_experts(model, tensors)
    tensors, qweights = _converted(model, tensors, qweights, who)
    experts = take_experts(model, tensors, who)
    for name in left_behind(model, tensors):
        del tensors[name]
    layers = _planned_layers(model, qweights, fit, who)
    adapted = {**layers, **_adapted_experts(model, experts)}
    check_active(adapted, metadata, who)
    missing = missing_adapters(adapted, metadata)
    expected = _dense_state(model, layers)
    for name, module in named_modules(model):
        if module in experts:
            for leaf in weight_names(module):
                del expected[_join(name, leaf)]
    filled = {name: each for name, each in named_modules(model) if isinstance(each, QuantModule) and name not in layers}
    keys = [_join(name, "checksum") for name in filled]  # which a file need not hold
    checksums = {key: tensors.pop(key) for key in keys if key in tensors}
    left = _check_dense(expected, tensors, adapted, missing, fit, who)
    for name, module in filled.items():
        for message in module.state_errors({**tensors, **checksums}, f"{name}."):
            raise ValueError(f"{who}: {path}: {message}")
    untied = _untied(model, expected, tensors, who)
    for dense, module in experts.items():
        replace_module(model, [name for name, each in named_modules(model) if each is dense], dense, module)
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


def _converted(
    model: nn.Module, tensors: dict[str, Tensor], qweights: dict[str, QuantizedWeight], who: str
) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """What a file holds by the model's names and in its layouts; see `key_conversion`."""
    state = state_dict(model)
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


def _read(path: Path, model: nn.Module, who: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor, what others publish in 4 bits by our names, and the adapters stored beside them, by layer."""
    dtype = next((each.dtype for each in model.parameters() if each.dtype in WEIGHT_DTYPES), None)
    with open_published(path, model, who, dtype) as published:
        if published is not None:
            if published.ignored:
                names = listed(published.ignored)
                warnings.warn(f"{who}: scales of activations are left out: {names}", stacklevel=4)
            return {name: published.read(name) for name in published.names}, {}
    tensors: dict[str, Tensor] = {}
    adapters: dict[str, Any] = {}
    for file in checkpoint_files(path, who):
        found, words = _read_file(file, who)
        tensors.update(found)
        adapters.update(stored_adapters(words, file, who))
    return tensors, adapters


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
    return {name: module for name, module in named_modules(model) if isinstance(module, QuantLinear)}


def _adapted_experts(
    model: nn.Module, made: Mapping[nn.Module, QuantExperts] | None = None
) -> dict[str, GroupedQuantLinear]:
    """name -> weight of experts in 4 bits, under the first name of each; `made`: dense module -> what stands for it."""
    found: dict[GroupedQuantLinear, str] = {}
    for name, module in named_modules(model):
        experts = (made or {}).get(module, module)
        if isinstance(experts, QuantExperts):
            for leaf in experts.weights:
                found.setdefault(getattr(experts, leaf), _join(name, leaf))
    return {name: part for part, name in found.items()}


def _dense_state(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The model's state without the weights of `layers`, nor what a file need not hold."""
    state = state_dict(model)
    for name in layers:
        for key in OF_WEIGHT:
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


def _planned_layers(model: nn.Module, qweights: dict[str, QuantizedWeight], fit: Fit, who: str) -> dict[str, nn.Module]:
    """name -> the layer that will hold that 4-bit weight, under all names; checked against the checkpoint."""
    modules: dict[str, Any] = dict(named_modules(model))
    chosen = {}
    for name, qweight in qweights.items():
        layer: Any = modules.get(name)
        is_dense = layer is not None and (type(layer) is nn.Linear or is_conv1d(layer))
        if not (isinstance(layer, QuantLinear) or (is_dense and name != "")):
            came: Any = "no such layer" if layer is None else type(layer).__name__
            raise ValueError(f"{who}: model must have a Linear or QuantLinear as {name or 'its root'}, got {came}")
        if linear_shape(layer) != qweight.shape:
            came = list(linear_shape(layer))
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
            layer, r = layers[name], adapter.config.r
            *experts, N, K = layer.weight_shape if isinstance(layer, QuantModule) else linear_shape(layer)
            factors = (*experts, r, K), (*experts, N, r)
            shapes.update(zip(adapter.keys(name), factors * 2))
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
        if name in expected and not expected[name].is_meta:
            check_cast(tensor, expected[name].dtype, f"{who}: {name}")
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
    return get_submodule(model, path), leaf


def _install(model: nn.Module, layers: Mapping[str, Any], qweights, missing_lora, tensors, untied) -> None:
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
    for name, adapters in missing_lora.items():
        adapted: Any = get_submodule(model, name)
        attach(adapted, adapters, {key: tensors[key].dtype for each in adapters for key in each.keys(name)}, name)
    for name in untied:
        owner, leaf = _owner(model, name)
        tied: Any = owner._parameters[leaf]
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(tied, requires_grad=False), tied.requires_grad)

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
