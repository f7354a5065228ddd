"""PEFT's tuners other than LoRA on a 4-bit layer: what they would do to its bytes as if they were weights is refused.

They take a QuantLinear for an nn.Linear. What works on activations alone is right, then. A merge writes to the bytes:
where shapes happen to broadcast, as for IA3 and RoAd, it does so without an error.
"""

from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...model.plan import QUANTIZED

WHO = "nf4kernels.integrations.peft"
REFUSED = (
    WHO + ": adapters on a 4-bit layer must leave its weight alone, as those of LoRA, IA3, VeRA or OFT do,"
    " got {kind} on {name}"
)
# UniLoRA takes the weight's dtype for its scales, which are zero as bytes, and so is its term. The others compute with
# the weight, or take it for floating point: on int8 layers, whose bytes have the weight's shape, without an error.
COMPUTE_WITH_WEIGHT = (
    "unilora", "loha", "lokr", "hra", "hira", "peanut", "shira", "supertuning", "deft", "adamss", "frod", "osf",
    "tinylora", "delora", "psoft",
)  # fmt: skip


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's own layers over one in 4 bits but LoRA's, which ours stand for."""
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, (lora.Linear, lora.ParamWrapper)):
            continue
        if type(layer).__module__.startswith("peft.") and isinstance(layer.get_base_layer(), QUANTIZED):
            yield name, layer


def checked_merge(merge: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """ValueError before the first layer is merged."""
    for name, layer in _layers(tuner.model):
        raise ValueError(
            f"{WHO}: the layers to merge must be dense or have LoRA adapters (unload() takes others off, dequantize the"
            f" model to merge them), got {_kind(layer)} on the 4-bit layer {name}"
        )
    return merge(tuner, *args, **kwargs)


def checked_inject(inject: Callable[..., Any], tuner: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """ValueError for adapters that compute with the weight itself, in their forward or from its dtype."""
    for name, kind in _refused(tuner, model, *args, **kwargs):
        raise ValueError(REFUSED.format(kind=kind, name=name))
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    result = inject(tuner, model, *args, **kwargs)
    for name, layer in _layers(model):
        if _kind(layer) in COMPUTE_WITH_WEIGHT:
            if len(tuner.peft_config) == 1:  # take it off again: get_peft_model gives nothing to do it with
                tuner.unload()
                for parameter, wanted in trained.items():
                    parameter.requires_grad_(wanted)
            raise ValueError(REFUSED.format(kind=_kind(layer), name=name))
    return result


def _refused(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Iterator[tuple[str, str]]:
    """(layer, kind) where such adapters would be, of what the configuration names itself."""
    config: Any = tuner.peft_config[adapter_name]
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    reads = kind in COMPUTE_WITH_WEIGHT or (kind == "miss" and getattr(config, "init_weights", None) == "bat")
    targets = getattr(config, "target_modules", None)
    if not reads or not targets:
        return
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        is_named = targets == "all-linear" or tuner._check_target_module_exists(config, name)
        if isinstance(base, QUANTIZED) and is_named:
            yield name, kind


def _kind(layer: nn.Module) -> str:
    return type(layer).__module__.split(".")[2]
