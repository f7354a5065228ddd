"""A checkpoint's tensors as dense ones: what it has in 4 bits is decoded when it is read."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..functional import dequantize
from ..quantized_weight import QuantizedWeight
from .bin_files import BinFiles
from .bitsandbytes_format import (
    StoredWeight,
    check_no_lone_part,
    stored_weight,
    stored_weights,
    weight_from_tensors,
)
from .decoded_experts import DecodedExperts
from .experts_format import stored_experts
from .tensor_files import TensorFiles


class DenseTensors:
    """The tensors of `files` by name, those in 4 bits as Ŵ; of experts in 4 bits as transformers writes dense ones.

    `model`, on the meta device, tells the dense layout of experts; `who` names the caller.

    Attributes:
        packed: key -> what is stored, of the weights of linear layers in 4 bits.
        experts: dense name -> the experts in 4 bits that it is of.

    Raises:
        ValueError: a weight in 4 bits is damaged, or there are experts in 4 bits and no model that has such.
    """

    def __init__(self, files: TensorFiles | BinFiles, who: str, model: nn.Module | None = None) -> None:
        self._files, self._who = files, who
        self._parts = stored_weights(files.names)
        check_no_lone_part(files.names, self._parts, who)
        self.packed: dict[str, StoredWeight] = {
            key: stored_weight(parts, files.read, key, who) for key, parts in self._parts.items()
        }
        inner = {name for parts in self._parts.values() for name in parts} - self._parts.keys()
        self.experts: dict[str, DecodedExperts] = {}
        for key in stored_experts(files.names):
            if model is None:
                raise ValueError(f"{who}: transformers must be installed and know the model to decode {key}")
            parts = [name for name in files.names if name.startswith(f"{key}.")]
            try:
                decoded = DecodedExperts(key, parts, files, model)
            except ValueError as error:
                raise ValueError(f"{who}: {error}") from None
            self.experts |= dict.fromkeys(decoded.on_meta, decoded)
            inner |= {*parts}
        left = [name for name in files.names if name not in inner]
        self.names: Collection[str] = dict.fromkeys([*left, *self.experts]).keys()

    def on_meta(self, name: str) -> Tensor:
        """Its shape and dtype."""
        if name in self.experts:
            return self.experts[name].on_meta[name]
        stored = self.packed.get(name)
        return self._files.on_meta(name) if stored is None else torch.empty(
            stored.shape, dtype=stored.dtype, device="meta"
        )  # fmt: skip

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor; of a weight in 4 bits Ŵ, in `dtype` or its own."""
        if name in self.experts:
            return self.experts[name].read(name, dtype or self.experts[name].dtype)
        if name not in self.packed:
            return self._files.read(name)
        return dequantize(self.read_packed(name), dtype or self.packed[name].dtype)

    def read_packed(self, name: str) -> QuantizedWeight:
        try:
            return weight_from_tensors({each: self._files.read(each) for each in self._parts[name]}, name)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._who}: {str(error).removeprefix('nf4kernels.weight_from_tensors: ')}") from None
