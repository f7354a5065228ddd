"""A checkpoint's tensors as dense ones: what it has in 4 bits is decoded when it is read."""

from collections.abc import Collection

import torch
from torch import Tensor

from ..functional import dequantize
from ..quantized_weight import QuantizedWeight
from .bin_files import BinFiles
from .bitsandbytes_format import (
    StoredWeight,
    check_no_lone_part,
    names_of_weight,
    stored_weight,
    stored_weights,
    weight_from_tensors,
)
from .experts_format import stored_experts
from .tensor_files import TensorFiles


class DenseTensors:
    """The tensors of `files` by name, those in 4 bits as Ŵ.

    Attributes:
        packed: key -> what is stored, of the weights in 4 bits.

    Raises:
        ValueError: a weight in 4 bits is damaged, or there are experts in 4 bits, whose dense layout the files do not
            tell; `who` names the caller.
    """

    def __init__(self, files: TensorFiles | BinFiles, who: str) -> None:
        self._files, self._who = files, who
        experts = stored_experts(files.names)
        if experts:
            raise ValueError(
                f"{who}: linear layers alone can be decoded file by file, got experts in 4 bits ({experts[0]});"
                " nf4kernels.merge_model does these on the loaded model"
            )
        keys = stored_weights(files.names)
        check_no_lone_part(files.names, keys, who)
        self.packed: dict[str, StoredWeight] = {key: stored_weight(files.names, files.read, key, who) for key in keys}
        self._parts = {key: names_of_weight(files.names, key) for key in keys}
        inner = {name for parts in self._parts.values() for name in parts} - set(keys)
        self.names: Collection[str] = {name: None for name in files.names if name not in inner}.keys()

    def on_meta(self, name: str) -> Tensor:
        """Its shape and dtype."""
        stored = self.packed.get(name)
        return self._files.on_meta(name) if stored is None else torch.empty(
            stored.shape, dtype=stored.dtype, device="meta"
        )  # fmt: skip

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor; of a weight in 4 bits Ŵ, in `dtype` or its own."""
        if name not in self.packed:
            return self._files.read(name)
        return dequantize(self.read_packed(name), dtype or self.packed[name].dtype)

    def read_packed(self, name: str) -> QuantizedWeight:
        try:
            return weight_from_tensors({each: self._files.read(each) for each in self._parts[name]}, name)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._who}: {str(error).removeprefix('nf4kernels.weight_from_tensors: ')}") from None
