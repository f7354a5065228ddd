"""What transformers' loader calls with the tensors of a checkpoint: to quantize them, or to put stored ones together."""

from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from ...codebook import CODEBOOKS
from ...storage.bitsandbytes_format import BITSANDBYTES_CODEBOOKS, PARTS, STATE

WEIGHT = "weight"


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
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if list(tensors) != [WEIGHT]:
            return self.quantizer.take_stored(model, full_layer_name, tensors, missing_keys)
        dense = tensors[WEIGHT]
        is_cast = self.dense_dtype is not None and dense.is_floating_point()
        return {full_layer_name: dense.to(self.dense_dtype) if is_cast else dense}


def stored_conversions(quantizer: Any) -> list[WeightConverter]:
    """The loader's rule that brings together all that is stored under the name of a weight."""
    states = [f"bitsandbytes__{name}" for name in BITSANDBYTES_CODEBOOKS]
    states += [f"nf4kernels__{name}" for name in (*CODEBOOKS, "custom") if name not in BITSANDBYTES_CODEBOOKS]
    # An older loader takes the first that matches, so the shortest comes last.
    sources = [*(f"{WEIGHT}.{part}" for part in PARTS), *(f"{WEIGHT}{STATE}{state}" for state in states), WEIGHT]
    return [WeightConverter(source_patterns=sources, target_patterns=WEIGHT, operations=[LoadStored(quantizer)])]


def is_stored_conversion(conversion: Any) -> bool:
    return any(isinstance(operation, LoadStored) for operation in getattr(conversion, "operations", ()))
