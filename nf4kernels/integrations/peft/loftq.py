"""LoftQ on a model that PEFT has wrapped already, without bitsandbytes."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model.merge import base_weights_of
from ...model.plan import unwrapped
from ...nn.lora import LoraConfig, principal_factors
from ...nn.quant_linear import QuantLinear
from ...storage.names import fit_of_part
from ...storage.tensor_files import TensorFiles, checkpoint_files
from .dora import QuantDoraVariant
from .lora import LoraQuantLinear

WHO = "nf4kernels.integrations.peft.replace_lora_weights_loftq"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module, base: nn.Module | str | Path, adapter_name: str = "default"
) -> None:
    """Let the adapter begin as the quantization error: scaling * B @ A is the best approximation of W - Ŵ of its rank.

    The counterpart of PEFT's function of that name, for layers of ours; one step of LoftQ (arXiv 2310.08659), which
    leaves the weights in 4 bits as they are, so that a saved adapter fits the same base. More steps change these too:
    `nf4.LoraConfig(init="loftq")`. Every layer is checked before the first one is changed.

    Args:
        peft_model: with an adapter of that name on QuantLinear layers; their B should be zero still, or what was
            trained is lost.
        base: the dense model, with the same names, or its directory, of which one weight at a time is read.
        adapter_name: of the adapter.

    Raises:
        TypeError, ValueError: no layer of ours has that adapter, or base lacks a layer or has it in another shape or
            not in floating point. OSError: the directory has no weights.
    """
    inner: Any = getattr(peft_model, "base_model", peft_model)
    model: nn.Module = getattr(inner, "model", inner)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraQuantLinear)
        and adapter_name in module.lora_A
        and isinstance(module.get_base_layer(), QuantLinear)
    }
    if not layers:
        raise ValueError(f"{WHO}: peft_model must have an adapter {adapter_name!r} on QuantLinear layers, got none")
    for name, layer in layers.items():
        variant = layer.lora_variant.get(adapter_name)
        if variant is not None and not isinstance(variant, QuantDoraVariant):
            raise ValueError(f"{WHO}: {name} must have plain LoRA or DoRA, got {type(variant).__name__}")
    quantizer = getattr(model, "hf_quantizer", None)
    transposed: Collection[str] = getattr(quantizer, "transposed", ())  # GPT-2's Conv1D
    weight_of = _weights(base, layers, transposed)
    for name, layer in layers.items():
        packed: Any = layer.get_base_layer()
        error = weight_of(name).to(packed.weight.device, torch.float32) - packed.dequantize(torch.float32)
        _start(layer, adapter_name, error)


def _start(layer: Any, adapter_name: str, error: Tensor) -> None:
    factors = [pair[adapter_name] for pair in (layer.lora_A, layer.lora_B)]
    scaling = layer.scaling[adapter_name]
    config = LoraConfig(r=layer.r[adapter_name], alpha=scaling * layer.r[adapter_name], init="loftq")
    for factor, values in zip(factors, principal_factors(error, config, factors[0].weight.dtype)):
        factor.weight.copy_(values)
    if adapter_name in layer.lora_variant:
        magnitudes = layer.lora_magnitude_vector[adapter_name]
        A, B = (factor.weight for factor in factors)
        magnitudes.weight.copy_(magnitudes.norms(layer.get_base_layer(), A, B, scaling))


def _weights(
    base: nn.Module | str | Path, layers: dict[str, LoraQuantLinear], transposed: Collection[str]
) -> Callable[[str], Tensor]:
    """The dense weight of a layer by its name; all of them are there and fit. Files have the `transposed` as [K, N]."""
    if isinstance(base, nn.Module):
        dense = unwrapped(base, "base", WHO)
        for name, layer in layers.items():
            base_weights_of(dense, name, layer.get_base_layer(), WHO)  # type: ignore[arg-type]  # a QuantLinear
        return lambda name: base_weights_of(dense, name, layers[name].get_base_layer(), WHO)[0]  # type: ignore[arg-type]
    if not isinstance(base, str | Path):
        raise TypeError(f"{WHO}: base must be a module or a directory, got {type(base).__name__}")
    if not Path(base).exists():
        raise FileNotFoundError(f"{WHO}: base must be a module or a directory that exists, got {base}")
    stored = TensorFiles(checkpoint_files(Path(base), WHO), WHO)
    keys = {name: f"{name}.weight" for name in layers}
    fit = fit_of_part(keys.values(), set(stored.names))
    keys = {name: fit(key) or key for name, key in keys.items()}
    for name, key in keys.items():
        if key not in stored.names:
            raise ValueError(f"{WHO}: base must have {key}, got {base} without it")
        packed: Any = layers[name].get_base_layer()
        weight, (N, K) = stored.on_meta(key), packed.weight_shape
        expected = (K, N) if name in transposed else (N, K)
        if tuple(weight.shape) != expected or not weight.is_floating_point():
            came = f"{list(weight.shape)} in {weight.dtype}"
            raise ValueError(f"{WHO}: base must have {key} in shape {list(expected)} and floating point, got {came}")
    return lambda name: stored.read(keys[name]).T if name in transposed else stored.read(keys[name])
