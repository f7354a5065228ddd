"""How PEFT comes to choose our layers, and what its walks over a model do for them besides."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.tuners import lora
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...model.plan import QUANTIZED
from ...nn.quant_linear import QuantLinear
from .lora import LoraQuantLinear
from .merge import finding_base_weights

MARK = "_nf4kernels"  # on a function of ours that stands in the place of one of PEFT's


def install() -> None:
    """Put our choice before PEFT's default one; a second call changes nothing.

    PEFT asks its dispatchers in turn, a configuration's own custom modules first and `dispatch_default`, which takes a
    QuantLinear for a dense nn.Linear, last.
    """
    _wrap(lora_model, "dispatch_default", _dispatch)
    _wrap(lora.LoraModel, "_replace_module", _replace_module)
    _wrap(lora.LoraModel, "_unload_and_optionally_merge", _unload)
    _wrap(lora.LoraModel, "merge_adapter", _merge_adapter)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Let `wrapper(what was there, *its arguments)` take the place of owner's attribute, once."""
    there = getattr(owner, name)
    if hasattr(there, MARK):
        return

    @wraps(there)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(there, *args, **kwargs)

    setattr(wrapped, MARK, True)
    setattr(owner, name, wrapped)


def _dispatch(default: Callable[..., Any], target: nn.Module, adapter_name: str, **kwargs: Any) -> Any:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, QuantLinear) and kwargs.get("parameter_name") is None:
        return LoraQuantLinear(target, adapter_name, **_options(kwargs))
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


def _packed_layers(model: nn.Module) -> dict[str, tuple[nn.Module, Any]]:
    """name -> (PEFT's layer, its layer in 4 bits)."""
    found: dict[str, tuple[nn.Module, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraQuantLinear):
            packed = module._packed or (module.get_base_layer(),)
            if isinstance(packed[0], QuantLinear):
                found[name] = (module, packed[0])
    return found


def _check_before(model: nn.Module, safe: bool, adapter_names: list[str] | None) -> None:
    """With `safe`, the errors of every layer's merge before the first one is merged."""
    if not safe:
        return
    layer: Any
    for layer, packed in _packed_layers(model).values():
        names = layer.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in layer.lora_A and name not in layer.merged_adapters]
        layer.merged_layer(packed, names, safe)


def _forget_quantization(model: Any) -> None:
    """A model without a layer in 4 bits is none that transformers need know as quantized."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if method == "nf4kernels" and not any(isinstance(module, QUANTIZED) for module in model.modules()):
        quantizer.remove_quantization_config(model)
