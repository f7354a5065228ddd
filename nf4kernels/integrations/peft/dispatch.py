"""How PEFT comes to choose our layers, and what its walks over a model do for them besides."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any

from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ...model.merge import merge_model
from ...model.plan import QUANTIZED
from ...nn.grouped_quant_linear import GroupedQuantLinear
from ...nn.quant_experts import QuantExperts
from ...nn.quant_linear import QuantLinear
from ...nn.quant_module import elements_beyond_bytes
from .experts import QuantExpertsWrapper
from .lora import LoraQuantLinear, ParamWrapper
from .merge import Packed, finding_base_weights
from .others import checked_inject, checked_merge

OURS = (LoraQuantLinear, QuantExpertsWrapper)
MARK = "_nf4kernels"  # on a function of ours that stands in the place of one of PEFT's


def install() -> None:
    """Put our choice before PEFT's default one; a second call changes nothing.

    PEFT asks its dispatchers in turn, a configuration's own custom modules first and `dispatch_default`, which takes a
    QuantLinear for a dense nn.Linear, last.
    """
    _wrap(BaseTuner, "inject_adapter", checked_inject)
    _wrap(BaseTuner, "merge_and_unload", checked_merge)
    _wrap(BaseTuner, "merge_adapter", checked_merge)
    _wrap(lora_model, "dispatch_default", _dispatch)
    _wrap(lora.LoraModel, "_create_and_replace", _create_and_replace)
    _wrap(lora.LoraModel, "_inject_parameters", _inject_parameters)
    _wrap(lora.LoraModel, "_replace_module", _replace_module)
    _wrap(lora.LoraModel, "_unload_and_optionally_merge", _unload)
    _wrap(lora.LoraModel, "merge_adapter", _merge_adapter)
    _wrap(PeftModel, "get_nb_trainable_parameters", _count_parameters)
    _wrap(ModulesToSaveWrapper, "update", _update_module_to_save)
    _wrap(ModulesToSaveWrapper, "enable_adapters", _enable_module_to_save)
    _wrap(lora.Linear, "__setattr__", _set_attribute)
    for method in ("forward", "merge", "unmerge", "get_param"):
        _wrap(lora.ParamWrapper, method, partial(_adopting_experts, method))


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Let `wrapper(what was there, *its arguments)` take the place of owner's attribute, once."""
    if hasattr(vars(owner).get(name), MARK):  # not one that is inherited, which may be wrapped for all tuners
        return
    there = getattr(owner, name)

    @wraps(there)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(there, *args, **kwargs)

    setattr(wrapped, MARK, True)
    setattr(owner, name, wrapped)


def _dispatch(default: Callable[..., Any], target: nn.Module, adapter_name: str, **kwargs: Any) -> Any:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, QuantExperts) and kwargs.get("parameter_name") is not None:
        options = kwargs if "config" in kwargs else {name: v for name, v in kwargs.items() if name != "lora_config"}
        return QuantExpertsWrapper(target, adapter_name, **options)
    layer_class = {None: LoraQuantLinear, "weight": ParamWrapper}.get(kwargs.get("parameter_name"))
    if isinstance(base, QuantLinear) and layer_class is not None:
        return layer_class(target, adapter_name, **_options(kwargs))
    return default(target, adapter_name, **kwargs)


def _options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords for lora.Linear: PEFT 0.18 hands them over one by one, later ones in the configuration."""
    options = {name: value for name, value in kwargs.items() if name != "parameter_name"}
    if "lora_config" in options:
        config = options.pop("lora_config")
        options.update(config.loftq_config)
        options["fan_in_fan_out"] = False
    else:
        config = options["config"]
    config.fan_in_fan_out = False  # as PEFT does for every nn.Linear
    return options


def _create_and_replace(create: Callable[..., None], model: Any, config: Any, name: str, target: Any, *args: Any,
                        **kwargs: Any) -> None:  # fmt: skip
    """A name in `target_modules` that dense experts have as a parameter, and PEFT passes over, is passed over here."""
    if not isinstance(target, GroupedQuantLinear):
        create(model, config, name, target, *args, **kwargs)


def _inject_parameters(
    inject: Callable[..., Any], tuner: Any, peft_config: Any, model: Any, adapter_name: str, low_cpu_mem_usage: bool
) -> Any:
    """`target_parameters` that name a weight of QuantExperts, besides PEFT's own."""
    found = inject(
        tuner, peft_config=peft_config, model=model, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    ours = []
    for path, experts in list(model.named_modules()):
        if not isinstance(experts, QuantExperts):
            continue
        name = dense_name(path)  # PEFT's wrappers around it are not in the dense model's names
        for leaf in experts.weight_names:
            key = f"{name}.{leaf}"
            if any(f".{key}".endswith(f".{target}") for target in peft_config.target_parameters):
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    _adapt_experts(tuner, peft_config, adapter_name, model, name, leaf)
                ours.append(key)
    if found is not None:
        return found + ours
    tuner.targeted_parameter_names.extend(ours)  # PEFT 0.18
    return None


def _adapt_experts(tuner: Any, config: Any, adapter_name: str, model: nn.Module, name: str, leaf: str) -> None:
    """Wrap the experts of that name for one of their weights, or give the wrapper that is there one adapter more."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    outermost: Any = getattr(parent, child)
    target = outermost
    while isinstance(target, QuantExpertsWrapper) and target.parameter_name != leaf:
        target = target.base_layer
    if not isinstance(target, QuantExpertsWrapper):
        target = outermost
    tuner._create_and_replace(
        config, adapter_name, target, child, parent, current_key=f"{name}.{leaf}", parameter_name=leaf
    )


def _replace_module(
    replace: Callable[..., None], model: Any, parent: nn.Module, child_name: str, new: nn.Module, child: Any
) -> None:
    """Without asking a layer on the meta device for its `qweight`, which raises."""
    if not isinstance(new, LoraQuantLinear):
        replace(model, parent, child_name, new, child)
        return
    setattr(parent, child_name, new)
    device = new.get_base_layer().weight.device
    for name, module in new.named_modules():
        if model.prefix in name and not any(parameter.is_meta for parameter in module.parameters()):
            module.to(device)


def _update_module_to_save(
    update: Callable[..., None], wrapper: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """The copy that is trained whole is dense, of Ŵ: bytes have no gradient."""
    is_new = adapter_name not in wrapper.modules_to_save and not (args or kwargs.get("tied_module"))
    if is_new and _holds_quantized(wrapper.original_module):
        holder = nn.ModuleList([copy.deepcopy(wrapper.original_module)])
        merge_model(holder)
        wrapper.modules_to_save[adapter_name] = holder[0].requires_grad_(False)  # PEFT unfreezes the active one
    update(wrapper, adapter_name, *args, **kwargs)


def _enable_module_to_save(enable: Callable[..., None], wrapper: Any, enabled: bool) -> None:
    """Without asking for gradients of the module as it was, as PEFT 0.18 does: bytes have none."""
    if enabled or not _holds_quantized(wrapper.original_module):
        enable(wrapper, enabled)
        return
    AuxiliaryTrainingWrapper.enable_adapters(wrapper, enabled)
    wrapper.modules_to_save.requires_grad_(False)


def _holds_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QUANTIZED) for module in model.modules())


def _set_attribute(set_attribute: Callable[..., None], layer: Any, name: str, value: Any) -> None:
    """A layer of PEFT's whose dense base layer is quantized after the fact becomes one of ours."""
    set_attribute(layer, name, value)
    if name == "base_layer" and isinstance(value, QuantLinear) and type(layer) is lora.Linear:
        LoraQuantLinear.adopt(layer)


def _adopting_experts(method: str, original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for experts, when they are used: of nested wrappers only the innermost is told of another base layer."""
    if type(wrapper) is lora.ParamWrapper and isinstance(wrapper.get_base_layer(), QuantExperts):
        wrapper.__class__ = QuantExpertsWrapper
        return getattr(wrapper, method)(*args, **kwargs)
    return original(wrapper, *args, **kwargs)


def _unload(unload: Callable[..., Any], model: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    if not merge:
        return unload(model, merge, *args, **kwargs)
    safe, names = kwargs.get("safe_merge", False), kwargs.get("adapter_names")
    with finding_base_weights(_packed_layers(model.model)):
        _check_before(model.model, safe, names)
        unloaded = unload(model, merge, *args, **kwargs)
    _forget_quantization(unloaded)
    return unloaded


def _merge_adapter(
    merge: Callable[..., None], model: Any, adapter_names: list[str] | None = None, safe_merge: bool = False
) -> None:
    with finding_base_weights(_packed_layers(model.model)):
        _check_before(model.model, safe_merge, adapter_names)
        merge(model, adapter_names=adapter_names, safe_merge=safe_merge)


def dense_name(name: str) -> str:
    """Without what PEFT's wrappers put into it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _packed_layers(model: nn.Module) -> list[Packed]:
    """Experts stand there once for each of their weights that is wrapped."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, OURS):
            packed = module._holder()._packed or (module.get_base_layer(),)
            if isinstance(packed[0], QUANTIZED):
                found.append(Packed(dense_name(name), module, packed[0]))
    return found


def _check_before(model: nn.Module, safe: bool, adapter_names: list[str] | None) -> None:
    """With `safe`, the errors of every layer's merge before the first one is merged."""
    if not safe:
        return
    layer: Any
    for _, layer, packed in _packed_layers(model):
        names = layer.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in layer.lora_A and name not in layer.merged_adapters]
        if isinstance(layer, LoraQuantLinear):
            layer.merged_layer(packed, names, safe)
        else:
            layer.merged_weight(packed, [*layer.merged_adapters, *names], safe)


def _count_parameters(count: Callable[..., tuple[int, int]], model: nn.Module) -> tuple[int, int]:
    """(trained, all), a weight in 4 bits by its elements and not by its bytes."""
    trained, total = count(model)
    return trained, total + elements_beyond_bytes(model)


def _forget_quantization(model: Any) -> None:
    """A model without a layer in 4 bits is none that transformers need know as quantized, GPT-2's Conv1D back in it."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if method == "nf4kernels" and not _holds_quantized(model):
        quantizer.forget(model)
        quantizer.remove_quantization_config(model)
