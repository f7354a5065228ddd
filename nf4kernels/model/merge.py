"""merge_model: from layers in 4 bits back to dense ones, adapters added in."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import outside_inference_mode
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import QuantLinear
from ..quantized_weight import WEIGHT_DTYPES
from .merge_sharded import merged_in_parts, shard_again
from .plan import QUANTIZED, check_container, is_conv1d, names_of_modules, parts, replace_module, unwrapped
from .sharded import Ranks, is_sharded, reshard
from .walk import get_submodule


@outside_inference_mode
def merge_model(model: nn.Module, base: nn.Module | None = None, dtype: torch.dtype | None = None) -> list[str]:
    """Replace every QuantLinear of `model` by an nn.Linear of Ŵ + scaling * lora_B @ lora_A, in place.

    QuantExperts become what they were made from, a module of the same class and configuration, of Ŵ and the products of
    each expert's adapters.

    With `base` the original weight W takes the place of Ŵ, which also undoes the quantization error. The sum is taken
    in fp32 and rounded once. Merging into 4 bits is not offered: rounding to 4 bits takes most of the
    fine-tuning away.

    Of a sharded model every rank calls and merges its own rows; adapters alone are gathered, and matrices whose blocks
    straddle rows. The merged weights are DTensors, cut as the packed ones were. FSDP2 goes on to gather them, each
    layer by itself, so that the model runs; make optimizers anew.

    Args:
        model: any module that contains layers. Its layers in 4 bits are replaced; their biases are rounded as their
            weights are, and nothing else is cast. Merged weights require gradients as any nn.Linear's do, a bias as
            before.
        base: the model before quantization, with the same names. It is read only.
        dtype: of the merged weights and biases; float32, bfloat16, float16, or None for what each layer was (its
            `dense_dtype`), in which the model goes on to run.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError, ValueError: an argument is wrong, `base` lacks a layer, has it in another shape, or not in floating
            point, or QuantExperts were not made from a module (the message names the layer). The model is then
            unchanged. ValueError too where a finite value does not fit `dtype`; the layers before that one are then
            replaced.
    """
    who = "nf4kernels.merge_model"
    model = unwrapped(model, "model", who)
    check_container(model, "model", who)
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: dtype must be float32, bfloat16, float16 or None, got {dtype}")
    if base is not None:
        base = unwrapped(base, "base", who)
    targets = [names for module, names in names_of_modules(model).items() if isinstance(module, QUANTIZED)]
    ranks = Ranks(model, who) if is_sharded(model) else None
    with nullcontext() if ranks is None else ranks.together():
        for names in targets:
            layer: Any = get_submodule(model, names[0])
            if any(part.weight.is_meta for part in parts(layer)):
                raise ValueError(f"{who}: model must be loaded, got layer {names[0]} on the meta device")
            if isinstance(layer, QuantExperts) and not layer.can_be_dense:
                raise ValueError(
                    f"{who}: {names[0]} must have been made by QuantExperts.from_experts, got one that was not"
                )
            if base is not None:
                base_weights_of(base, names[0], layer, who)

    if base is not None:
        reshard(base)
    merged: dict[str, tuple[nn.Module, nn.Module]] = {}
    for names in targets:
        layer = get_submodule(model, names[0])
        base_weights = None if base is None else base_weights_of(base, names[0], layer, who)
        try:
            dense = _dense(layer, dtype, base_weights, ranks)
        except ValueError as error:
            if ranks is not None:
                shard_again(model, merged)
            raise ValueError(f"{who}: layer {names[0]} failed, those before it are replaced: {error}") from None
        if isinstance(layer, QuantLinear) and dense.bias is not None:
            dense.bias.requires_grad_(layer.bias.requires_grad)
        replace_module(model, names, layer, dense)
        if ranks is not None:  # else each layer in 4 bits goes as soon as it is merged
            merged[names[0]] = layer, dense
    if ranks is not None:
        shard_again(model, merged)
    return [names[0] for names in targets]


def _dense(
    layer: QuantLinear | QuantExperts,
    dtype: torch.dtype | None,
    base_weights: list[Tensor] | None,
    ranks: Ranks | None,
) -> Any:
    if ranks is not None:
        return merged_in_parts(layer, dtype, base_weights, ranks)
    if isinstance(layer, QuantExperts):
        return layer.to_experts(dtype, base_weights)
    return layer.to_linear(dtype, base_weight=None if base_weights is None else base_weights[0])


def base_weights_of(base: nn.Module, name: str, layer: QuantLinear | QuantExperts, who: str) -> list[Tensor]:
    """base's dense weights of that name, one or the experts' two; ValueError where they do not fit the layer."""
    try:
        module = get_submodule(base, name)
    except AttributeError:
        raise ValueError(f"{who}: base must have a layer {name}, got none") from None
    is_linear = isinstance(layer, QuantLinear)
    leaves, what = (("weight",), "an nn.Linear") if isinstance(layer, QuantLinear) else (layer.weights, "experts")
    weights: list[Any] = [getattr(module, leaf, None) for leaf in leaves]
    if is_conv1d(module):
        weights = [None if weight is None else weight.T for weight in weights]
    is_dense = (isinstance(module, nn.Linear) or is_conv1d(module)) == is_linear and not isinstance(module, QUANTIZED)
    if not is_dense or not all(isinstance(weight, Tensor) and weight.is_floating_point() for weight in weights):
        raise ValueError(f"{who}: base must have {what} in floating point as {name}, got {module}")
    for leaf, weight in zip(leaves, weights):
        key = name if isinstance(layer, QuantLinear) else f"{name}.{leaf}"
        shape = layer.weight_shape if isinstance(layer, QuantLinear) else layer.dense_shape(leaf)
        if tuple(weight.shape) != shape:
            raise ValueError(f"{who}: base must have {key} in shape {list(shape)}, got {list(weight.shape)}")
        if weight.is_meta:
            raise ValueError(f"{who}: base must be loaded, got {key} on the meta device")
    return [weight.detach() for weight in weights]
