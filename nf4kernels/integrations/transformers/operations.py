"""What transformers' loader calls with a checkpoint's tensors: to quantize them, or to put stored ones together."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter

from ...codebook import CODEBOOKS
from ...storage.bitsandbytes_format import BITSANDBYTES_CODEBOOKS, PARTS, STATE

WEIGHT = "weight"
ALONE = f"{WEIGHT}$"


class QuantizeOnLoad(ConversionOps):
    """A dense tensor becomes the weight of a 4-bit layer as soon as it is read."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict, model=None, missing_keys=None, **kwargs) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            made.update(self.quantizer.take_dense(model, name, tensor, missing_keys))
        return made


class OneExpertAtATime(WeightConverter):
    """A converter that merges a matrix for each expert into one tensor, when that is quantized: expert by expert.

    transformers reads all of a layer's experts, stacks and concatenates them: twice the dense tensor at the peak.
    """

    __slots__ = ()

    @classmethod
    def instead_of(cls, converter: Any) -> Any:
        """The same rule; a converter that does not merge experts is itself."""
        if type(converter) is not WeightConverter or len(converter.target_patterns) != 1:
            return converter
        first = converter.operations[0]
        if not isinstance(first, MergeModulelist) or first.dim != 0:
            return converter
        return _of_class(converter, cls)

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        counts = {len(tensors) for tensors in self.collected_tensors.values()}
        if not isinstance(self.quantization_operation, QuantizeOnLoad) or len(counts) != 1:
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)

        def experts() -> Iterator[Tensor]:
            for index in range(min(counts)):
                one = _of_class(self, WeightConverter)
                one.quantization_operation = None
                one.collected_tensors = {pattern: [each[index]] for pattern, each in self.collected_tensors.items()}
                (value,) = one.convert(layer_name, model=model, config=config).values()
                yield value[0] if isinstance(value, list) else value

        quantizer, missing_keys = self.quantization_operation.quantizer, getattr(loading_info, "missing_keys", None)
        return quantizer.take_experts(model, layer_name, experts(), missing_keys)


def _of_class(converter: Any, kind: type) -> Any:
    """A shallow copy: these classes have the same attributes and another `convert`."""
    twin = copy.copy(converter)
    twin.__class__ = kind
    return twin


class LoadStored(ConversionOps):
    """The tensors that a checkpoint holds for one 4-bit weight become that weight; a lone dense one stays as it is.

    Attributes:
        dense_dtype: what a dense tensor is cast to; None where the loader has done that.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        self.dense_dtype: Any = None

    def __deepcopy__(self, memo: dict) -> "LoadStored":
        """The loader copies the operation for each weight, and with it must not copy the quantizer."""
        return LoadStored(self.quantizer)

    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs) -> dict[str, Tensor]:
        tensors = {
            key.removesuffix("$"): value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        if list(tensors) != [WEIGHT]:
            return self.quantizer.take_stored(model, full_layer_name, tensors, missing_keys)
        dense = tensors[WEIGHT]
        if self.quantizer.is_awaiting:
            dense = torch.empty_like(dense)
        is_cast = self.dense_dtype is not None and dense.is_floating_point()
        return {full_layer_name: dense.to(self.dense_dtype) if is_cast else dense}


def stored_conversions(quantizer: Any) -> list[WeightConverter]:
    """The loader's rule that brings together all that is stored under the name of a weight."""
    states = [f"bitsandbytes__{name}" for name in BITSANDBYTES_CODEBOOKS]
    states += sorted((f"nf4kernels__{name}" for name in (*CODEBOOKS, "custom")), key=len, reverse=True)
    # An older loader takes the first that matches, so what another begins with comes after it. The shortest is anchored
    # for the newer ones, where it would match the end of a layer's name before the weight: of
    # block_inject_weight.weight.absmax.
    sources = [*(f"{WEIGHT}.{part}" for part in PARTS), *(f"{WEIGHT}{STATE}{state}" for state in states), ALONE]
    return [WeightConverter(source_patterns=sources, target_patterns=WEIGHT, operations=[LoadStored(quantizer)])]


def is_stored_conversion(conversion: Any) -> bool:
    return any(isinstance(operation, LoadStored) for operation in getattr(conversion, "operations", ()))


def is_converter(conversion: Any) -> bool:
    """Whether it changes values, not names alone."""
    return isinstance(conversion, WeightConverter)


def converts(conversion: Any, names: Iterable[str]) -> bool:
    """Whether it takes the values of one of the names."""
    return is_converter(conversion) and any(conversion.rename_source_key(name)[1] for name in names)
