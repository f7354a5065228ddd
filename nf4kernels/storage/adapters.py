"""LoRA adapters on disk, and what was trained beside them: PEFT's files, written and read."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..model.plan import unwrapped
from ..model.sharded import Ranks, copy_own_part, is_sharded
from ..model.walk import named_modules
from ..modes import outside_inference_mode
from ..nn.adapted_module import AdaptedModule
from ..nn.casts import check_cast
from ..nn.dtensors import is_dtensor, whole
from ..nn.grouped_quant_linear import GroupedQuantLinear
from ..nn.lora import FROM_WEIGHT, check_adapter_name, over_original_weight
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import QuantModule
from ..nn.released import check_gathered
from .atomic import replacing
from .names import fit_of_part
from .peft_experts import ExpertsShapes, experts_loras, to_peft, wrapped_module, wrapper_names
from .peft_format import (
    CONFIG,
    OLD_WEIGHTS,
    PREFIX,
    WEIGHTS,
    StoredLora,
    peft_config,
    read_config,
    read_tensors,
    stored_lora,
)


def save_adapters(model: nn.Module, directory: str | Path, name: str | None = None) -> None:
    """Write the adapters of all layers in 4 bits as PEFT does, for `PeftModel.from_pretrained` on the dense model.

    Layers may differ in rank and alpha; PEFT has one dropout and one rsLoRA setting for all. Tensors keep their dtype.
    Those of QuantExperts are written as of its `target_parameters`, from PEFT 0.19.1 on, which has no dropout beside
    them: a warning says where one is left out.
    Whatever else requires a gradient is saved with them: modules without children as PEFT's `modules_to_save`, biases
    of layers in 4 bits as its `bias`, any other parameter by its name. `prepare_for_training` freezes all of that.
    An adapter that started from the weight (`init` "pissa" or "loftq") is written as its change since then, a plain
    LoRA of twice the rank over the original weight, in 16 bits or quantized without the adapter.
    Both files are complete or absent, each written under another name, flushed to disk and renamed.
    Of a sharded model every rank calls: adapters are gathered one at a time, the first rank writes, and all return when
    the files are there, or raise its error.

    Args:
        model: a model that contains layers in 4 bits with adapters; accelerate may have offloaded it, and FSDP2 or
            another plan of DTensors may have sharded it.
        directory: made where missing; `adapter_config.json` and `adapter_model.safetensors` in it are replaced.
        name: of the adapter to save where layers have several; None is the active one.

    Raises:
        TypeError, ValueError: model is not a module, contains no adapter of that name, or has adapters that PEFT cannot
            express.
        OSError: directory cannot be written.
    """
    who = "nf4kernels.save_adapters"
    model = unwrapped(model, "model", who)
    found: dict[AdaptedModule, str] = {}  # PEFT, too, names a layer once
    for path, layer in _layers(model).items():
        if layer.get_adapter(name) is not None:
            found.setdefault(layer, path)
    layers = {path: layer for layer, path in found.items()}
    ranks = Ranks(model, who)
    if not layers:
        came = "none" if name is None else f"none called {name!r}"
        raise ValueError(f"{who}: model must have a layer in 4 bits with an adapter, got {came}")
    if "" in layers or any("." not in path for path, each in layers.items() if isinstance(each, GroupedQuantLinear)):
        raise ValueError(f"{who}: model must contain its layers, got a {type(model).__name__} itself")
    ranks.check_one_model(Path(directory), sorted(layers))
    names_in_file = {path: path for path in layers}
    parameters = _parameters_of_experts(model)
    for path, names in parameters.items():
        adapted = [f"{path}.{each}" for each in names if f"{path}.{each}" in layers]
        names_in_file.update(zip(adapted, wrapper_names(path, len(adapted))))
    tensors, configs = {}, {}
    for path, layer in sorted(layers.items()):
        config, *factors = layer.get_adapter(name)  # type: ignore[misc]  # it has one
        matrices: Any
        factors = [_on_cpu(factor, f"{path}.{leaf}", who) for leaf, factor in zip(("lora_A", "lora_B"), factors)]
        configs[path], *matrices = over_original_weight(config, *factors)
        matrices = to_peft(*matrices) if isinstance(layer, GroupedQuantLinear) else matrices
        for leaf, matrix in zip(("lora_A", "lora_B"), matrices if ranks.is_first else ()):
            tensors[f"{names_in_file[path]}.{leaf}.weight"] = matrix.detach().contiguous().clone()
    beside, saved, bias = _trained_beside(model, layers, who)
    of_experts = {f"{path}.{each}" for path, names in parameters.items() for each in names}
    others = {*_dense_modules(model), *of_experts} - {""} - set(layers)
    config = peft_config(model, configs, of_experts & set(layers), others, saved, bias, who)

    with ranks.together():
        if ranks.is_first:
            _write({f"{PREFIX}{key}": tensor for key, tensor in (tensors | beside).items()}, config, Path(directory))


def _write(tensors: dict[str, Tensor], config: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as weights, replacing(directory / CONFIG) as text:
        save_file(tensors, weights, {"format": "pt"})
        text.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@outside_inference_mode
def load_adapters(model: nn.Module, directory: str | Path, name: str = "default") -> None:
    """Give the layers of `model` in 4 bits the adapters that PEFT or `save_adapters` wrote, and make them active.

    They take the place of the adapters of that name: a layer that the file does not name loses its own, one whose
    adapter has another rank gets a new one, in the file's dtype, and one of that rank keeps its parameters, with new
    values and scaling. Adapters of other names are kept and wait. What was trained beside the adapters is copied into
    the model. All that was loaded is left trainable. The names in the file may all have one prefix more, or one less,
    than in the model.

    Into a sharded model every rank loads its part; its layers must have had adapters of that name and rank already
    when it was sharded, since what shards a model takes no new parameters.

    Args:
        model: a model that contains the QuantLinear layers, and the experts, that the file names.
        directory: with `adapter_config.json` and `adapter_model.safetensors`, or `adapter_model.bin`, of which nothing
            but tensors is read.
        name: of the adapter in the model.

    Raises:
        TypeError, ValueError: model is not a module, or has an adapter that started from the weight; a file is damaged;
            the adapter uses a feature that is not
            supported (DoRA, token indices, ...); a layer is missing, unknown or of another shape. The message names it,
            and the model is unchanged.
        OSError: a file is missing.
    """
    who = "nf4kernels.load_adapters"
    model = unwrapped(model, "model", who)
    check_adapter_name(name, who)
    ranks = Ranks(model, who)
    with ranks.together():
        layers, adapters, state, beside = _read_checked(model, Path(directory), name, who)
        if is_sharded(model):
            _check_sharded(layers, adapters, name, who)

    given = {layers[path]: adapter for path, adapter in adapters.items()}
    for layer in dict.fromkeys(layers.values()):
        _replace_adapter(layer, name, given.get(layer))
    for path, stored in beside.items():
        copy_own_part(state[path], stored)
        if isinstance(state[path], nn.Parameter) and state[path].is_floating_point():
            state[path].requires_grad_(True)


def _read_checked(
    model: nn.Module, directory: Path, name: str, who: str
) -> tuple[dict[str, AdaptedModule], dict[str, StoredLora], dict[str, Tensor], dict[str, Tensor]]:
    """(the model's layers, their adapters in the file, the model's state, what the file has beside the adapters)."""
    weights = directory / (OLD_WEIGHTS if not (directory / WEIGHTS).is_file() else WEIGHTS)
    for file, expected in ((directory / CONFIG, CONFIG), (weights, WEIGHTS)):
        if not file.is_file():
            raise FileNotFoundError(f"{who}: directory must have {expected}, got {directory}")
    config = read_config(directory / CONFIG, who)
    factors, beside = read_tensors(weights, config, who)
    layers, state = _layers(model), _dense_state(model)
    fit = fit_of_part({*(wrapped_module(path)[0] for path in factors), *beside}, {*_dense_modules(model), *state})
    modules = {path: module for path, module in named_modules(model) if isinstance(module, QuantExperts)}
    experts = {path: shapes for path, module in modules.items() if (shapes := ExpertsShapes.of(module)) is not None}
    adapters = experts_loras(factors, experts, fit, config, directory / CONFIG, who)
    for path, (A, B) in factors.items():
        if (fit(wrapped_module(path)[0]) or wrapped_module(path)[0]) not in experts:
            adapters[fit(path) or path] = stored_lora(config, path, A, B, directory / CONFIG, who)
    beside = {fit(path) or path: stored for path, stored in beside.items()}
    _check_base(layers, who)
    _check_fit(layers, adapters, name, who)
    _check_beside(state, beside, weights, who)
    return layers, adapters, state, beside


def _check_sharded(layers: dict[str, AdaptedModule], adapters: dict[str, StoredLora], name: str, who: str) -> None:
    """ValueError where an adapter would have to be attached to a sharded layer, or taken from it."""
    given = {layers[path]: adapter.config.r for path, adapter in adapters.items()}
    for path, layer in layers.items():
        old = layer.get_adapter(name)
        ours, theirs = None if old is None else old[0].r, given.get(layer)
        if ours != theirs:
            raise ValueError(
                f"{who}: {path} of a sharded model must have had the file's adapter {name!r} of rank {theirs} when it"
                f" was sharded (quantize, add adapters, then shard), got {'none' if ours is None else f'rank {ours}'}"
            )


def _replace_adapter(layer: AdaptedModule, name: str, stored: StoredLora | None) -> None:
    """Make `stored` the layer's active adapter of that name; where it is None the layer has none of that name."""
    old = layer.get_adapter(name)
    if old is not None and (stored is None or stored.config.r != old[0].r):
        layer.remove_adapter(name)
        old = None
    if stored is None:
        layer.set_adapter(None)
        return
    if old is None:
        layer.add_lora(stored.config, stored.A.dtype, name)
    layer.set_adapter(name)
    layer.lora = stored.config
    factors: Any = (layer.lora_A, layer.lora_B)
    for factor, values in zip(factors, (stored.A, stored.B)):
        copy_own_part(factor.weight, values)


def _layers(model: nn.Module) -> dict[str, AdaptedModule]:
    """name -> layer under all its names, without what torch.compile puts into them; of experts, each weight."""
    return {name: module for name, module in named_modules(model) if isinstance(module, AdaptedModule)}


def _parameters_of_experts(model: nn.Module) -> dict[str, list[str]]:
    """experts -> their two weights' names, in the order that the dense module has them."""
    return {path: each.weight_names for path, each in named_modules(model) if isinstance(each, QuantExperts)}


def _dense_modules(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module, of the dense model: nothing below a QuantLinear, and no weight of experts."""
    found: dict[str, nn.Module] = {}
    inside = "\0"
    for name, module in named_modules(model):
        if not name.startswith(inside):
            inside = f"{name}." if isinstance(module, AdaptedModule) else inside
            if not isinstance(module, GroupedQuantLinear):
                found[name] = module
    return found


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """name -> tensor of the dense model's state that is no 4-bit weight."""
    state = {}
    for name, module in _dense_modules(model).items():
        leaves = ["bias"] if isinstance(module, QuantModule) else [*module._parameters, *module._buffers]
        for leaf in leaves:
            tensor = getattr(module, leaf, None)
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                state[f"{name}.{leaf}" if name else leaf] = tensor
    return state


def _values(module: nn.Module, leaf: str, path: str, who: str) -> Tensor:
    """A copy of a parameter on the CPU; where accelerate has offloaded it, of what the module's hook keeps."""
    tensor = getattr(module, leaf)
    if tensor.is_meta:
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            tensor = tensor if getattr(each, "weights_map", None) is None else each.weights_map[leaf]
    if tensor.is_meta:
        raise ValueError(f"{who}: model must be loaded, got {path} on the meta device")
    check_gathered([(f"{path}.{leaf}", tensor)], who)
    if is_dtensor(tensor):
        return whole(tensor).cpu()
    return tensor.detach().cpu().contiguous().clone()


def _on_cpu(factor: nn.Module, path: str, who: str) -> nn.Module:
    """A copy of a factor's weight, and of the values it started from where it has them."""
    copied = nn.Module()
    copied.weight = nn.Parameter(_values(factor, "weight", path, who), requires_grad=False)
    if "start" in factor._buffers:
        copied.register_buffer("start", _values(factor, "start", path, who))
    return copied


def _trained_beside(
    model: nn.Module, adapted: dict[str, AdaptedModule], who: str
) -> tuple[dict[str, Tensor], list[str], str]:
    """(key without PREFIX -> tensor, modules_to_save, bias) of what requires a gradient and is no adapter.

    A module without children is saved whole, so that PEFT makes a copy of it; PEFT finds it by the end of its name,
    which must then be no other module's. What cannot be saved so is saved under its own name: PEFT loads that as well.
    """
    modules = _dense_modules(model)
    tensors: dict[str, Tensor] = {}
    saved, biases, seen = [], set(), set()
    for name, module in modules.items():
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None and not is_lazy(p)}
        trained = [leaf for leaf, parameter in own.items() if parameter.requires_grad]
        if not trained or module in seen:
            continue
        seen.add(module)
        if isinstance(module, QuantLinear):
            key = f"{name}.base_layer.bias" if name in adapted else f"{name}.bias"
            tensors[key] = _values(module, "bias", name, who)
            biases.add("lora_only" if name in adapted else "all")
            continue
        ends_alike = [other for other in modules if other.endswith(name)]
        is_container = isinstance(module, nn.ParameterList | nn.ParameterDict)
        is_leaf = next(module.children(), None) is None
        if name and ends_alike == [name] and is_leaf and not is_container:
            saved.append(name)
            buffers = [leaf for leaf in module._buffers if leaf not in module._non_persistent_buffers_set]
            trained = [leaf for leaf in (*module._parameters, *buffers) if getattr(module, leaf) is not None]
        for leaf in trained:
            tensors[f"{name}.{leaf}" if name else leaf] = _values(module, leaf, name, who)
    return tensors, saved, min(biases, default="none")


def _check_base(layers: dict[str, AdaptedModule], who: str) -> None:
    """ValueError where a layer holds what one of its adapters left of the weight."""
    for path, layer in layers.items():
        for each in layer.adapter_names:
            init = layer.get_adapter(each)[0].init  # type: ignore[index]  # it has one of that name
            if init in FROM_WEIGHT:
                raise ValueError(
                    f"{who}: the layers must have been quantized without an adapter that started from their weight, got"
                    f" {path} with {each!r} (init={init!r}); load into a model that was not"
                )


def _check_fit(layers: dict[str, AdaptedModule], adapters: dict[str, StoredLora], adapter_name: str, who: str) -> None:
    """ValueError unless every adapter has its layer, and its values are finite in the dtype that they will have."""
    given = set()
    for name, adapter in adapters.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"{who}: model must have a QuantLinear or experts in 4 bits as {name}, got none")
        if layer in given:
            raise ValueError(f"{who}: the file must have one adapter a layer, got a second one as {name}")
        given.add(layer)
        came = (*adapter.B.shape[:-1], adapter.A.shape[-1])
        if came != layer.weight_shape:
            raise ValueError(f"{who}: the adapter of {name} must be for {list(layer.weight_shape)}, got {list(came)}")
        if layer.weight.is_meta:
            raise ValueError(f"{who}: model must be loaded, got {name} on the meta device")
        check_gathered(layer.named_parameters(name), who)
        old = layer.get_adapter(adapter_name)
        if old is not None and old[0].r == adapter.config.r:
            for factor, stored in zip(old[1:], (adapter.A, adapter.B)):
                check_cast(stored, factor.weight.dtype, f"{who}: the adapter of {name}")


def _check_beside(state: dict[str, Tensor], beside: dict[str, Tensor], file: Path, who: str) -> None:
    """ValueError unless every further tensor is one of the model's, of that shape."""
    for name, stored in beside.items():
        target = state.get(name)
        if target is None:
            expected = f"{PREFIX}<layer>.lora_A|B.weight and dense tensors of the model"
            raise ValueError(f"{who}: {file} must hold {expected} only, got {PREFIX}{name}")
        check_gathered([(name, target)], who)
        if target.shape != stored.shape:
            raise ValueError(f"{who}: {name} must have shape {list(target.shape)}, got {list(stored.shape)}")
        if target.is_meta:
            raise ValueError(f"{who}: model must be loaded, got {name} on the meta device")
        check_cast(stored, target.dtype, f"{who}: {name}")
