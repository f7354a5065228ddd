"""A whole model's tensors on disk, in plain safetensors files."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..model.plan import is_conv1d, linear_shape, replace_module, unwrapped
from ..model.sharded import is_sharded
from ..model.walk import get_submodule, named_modules, state_dict
from ..modes import outside_inference_mode
from ..nn.adapted_module import AdaptedModule
from ..nn.experts_layout import weight_names
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import QuantModule
from ..nn.released import check_gathered
from ..quantized_weight import QuantizedWeight
from .bitsandbytes_format import stored_weights, weight_from_tensors, weight_to_tensors
from .checkpoint_adapters import adapter_metadata, attach, check_active, missing_adapters, stored_adapters
from .checkpoint_fit import check_dense, rename
from .experts_format import name_experts, stored_experts, take_experts
from .key_conversion import group_tensors
from .model_state import adapted_experts, dense_state, float_dtype, join, quant_layers, shared, unwritable
from .names import Fit, left_behind, listed, never_stored
from .published.opening import open_published
from .sharded_load import load_in_parts
from .sharded_save import save_sharded
from .tensor_files import checkpoint_files, write_tensors


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write all tensors of `model` to one safetensors file: QuantLinear weights by bitsandbytes' names, the rest as is.

    That includes QuantExperts, for which bitsandbytes has no format. Of tensors that share memory the first is written.
    Adapters are written with their configuration. The file is complete or absent: it is written under another name,
    flushed to disk and renamed.

    Of a sharded model (FSDP2, any DTensors) every rank calls, and `path` is a directory: safetensors files and their
    index, as Hugging Face has them. Each rank writes some of the files, of tensors that are gathered one at a time, so
    that none holds more than its own part and one file, at most a GiB or one tensor. The index is written last, the
    directory takes its place when all is there, and all ranks return then, or raise what one of them met.

    Args:
        model: any module.
        path: of the file, or of the directory, which all ranks must see; an existing one is replaced, a directory only
            if it holds a checkpoint and no more.

    Raises:
        TypeError, ValueError: model is not a module, is on the meta device, or has state that is not a tensor.
        OSError: path cannot be written.
    """
    who = "nf4kernels.save_checkpoint"
    model = unwrapped(model, "model", who)
    if is_sharded(model):
        save_sharded(model, Path(path), who)
        return
    check_gathered(model.named_parameters(), who)
    tensors = {}
    layers = quant_layers(model)
    expected = dense_state(model, layers)
    for name, tensor in expected.items():
        came = unwritable(tensor)
        if came is not None:
            raise ValueError(f"{who}: {name} in model's state must be a loaded tensor, got {came}")
    for module in model.modules():
        if isinstance(module, QuantModule) and not isinstance(module, QuantLinear):
            module.checked_weight()  # a QuantLinear's is checked with its qweight
    for group in shared(expected):
        tensors[group[0]] = expected[group[0]]
    written: dict[QuantLinear, str] = {}
    for name, layer in layers.items():
        if layer in written:
            continue
        written[layer] = name
        try:
            tensors.update(weight_to_tensors(layer.qweight, join(name, "weight")))
        except ValueError as error:
            raise ValueError(f"{who}: layer {name}: {error}") from None
    adapted: dict[str, AdaptedModule] = {name: layer for layer, name in written.items()}
    adapted.update(adapted_experts(model))
    write_tensors(tensors, Path(path), adapter_metadata(adapted))


@outside_inference_mode
def load_checkpoint(model: nn.Module, path: str | Path, quantize: bool = False) -> None:
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

    A sharded model (FSDP2, any DTensors) has been quantized, then sharded, both on meta if you like. Every rank calls
    and reads its own rows of each tensor, in the model's dtype, one tensor after the other; an error on one rank is
    raised on all. Layers are not replaced then, adapters not attached and tensors not untied: what the file would need
    of that is a ValueError. Adapters of which the file has none start as their configurations say, alike on all ranks.

    Args:
        model: a module with the checkpoint's names, or one that transformers has rules for; dense or quantized.
        path: a safetensors file, a directory with `model.safetensors` or `model.safetensors.index.json`, a GGUF file.
        quantize: where the file has a dense weight for a layer in 4 bits, quantize it with the layer's options: the
            same bits as `quantize_model` makes of the dense model, which is never in memory as a whole. Each rank of a
            sharded model quantizes its rows; a matrix whose blocks straddle rows is read whole. The model, sharded or
            not, is then read as a sharded one is.

    Raises:
        TypeError: model is not a module.
        ValueError: a file is damaged, or in a published layout that is not read; names are missing or unknown; a tensor
            does not fit. The message names the file or the key, and the model is unchanged. Read as a sharded model is,
            all of this is checked first; a dense weight that cannot be quantized (a NaN) is found when its turn comes,
            and what was before it is loaded.
        OSError: path cannot be read.
    """
    who = "nf4kernels.load_checkpoint"
    model = unwrapped(model, "model", who)
    if quantize or is_sharded(model):
        load_in_parts(model, Path(path), quantize, who)
        return
    tensors, metadata = _read(Path(path), model, who)
    qweights = {}
    for weight_key, names in stored_weights(tensors).items():
        parts = {name: tensors.pop(name).clone() for name in names}  # not views of the file
        try:
            qweights[weight_key.removesuffix("weight").removesuffix(".")] = weight_from_tensors(parts, weight_key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{who}: {path}: {error}") from None

    for name in never_stored(model, tensors):
        del tensors[name]
    fit, outside = rename(model, tensors, qweights, metadata)
    name_experts(model, tensors)
    tensors, qweights = _converted(model, tensors, qweights, who)
    experts = take_experts(model, tensors, who)
    for name in left_behind(model, tensors):
        del tensors[name]
    layers = _planned_layers(model, qweights, fit, who)
    adapted = {**layers, **adapted_experts(model, experts)}
    check_active(adapted, metadata, who)
    missing = missing_adapters(adapted, metadata)
    expected = dense_state(model, layers)
    for name, module in named_modules(model):
        if module in experts:
            for leaf in weight_names(module):
                del expected[join(name, leaf)]
    filled = {name: each for name, each in named_modules(model) if isinstance(each, QuantModule) and name not in layers}
    keys = [join(name, "checksum") for name in filled]  # which a file need not hold
    checksums = {key: tensors.pop(key) for key in keys if key in tensors}
    left = check_dense(expected, tensors, adapted, missing, fit, who)
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


def _converted(
    model: nn.Module, tensors: dict[str, Tensor], qweights: dict[str, QuantizedWeight], who: str
) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """What a file holds by the model's names and in its layouts; see `key_conversion`."""
    state = state_dict(model)
    packed = {join(name, "weight"): qweight for name, qweight in qweights.items()}
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
    with open_published(path, model, who, float_dtype(model)) as published:
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
            raise ValueError(f"{who}: {join(name, 'weight')} must have shape {came}, got {list(qweight.shape)}")
        chosen[layer] = name
    planned = {name: layer for name, layer in modules.items() if layer in chosen}
    for name, layer in modules.items():
        if isinstance(layer, QuantLinear) and layer not in chosen and name.startswith(fit.added):
            key = join(name, "weight")
            raise ValueError(
                f"{who}: the checkpoint must have a 4-bit weight {key}, got none (a dense one: quantize=True)"
            )
    return planned


def _untied(model: nn.Module, expected: dict[str, Tensor], tensors: dict[str, Tensor], who: str) -> dict[str, str]:
    """name -> the name it is tied to in the model, where the file holds different values for the two."""
    untied = {}
    for group in shared(expected):
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
