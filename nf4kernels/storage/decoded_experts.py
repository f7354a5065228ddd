"""Fused experts that files have in 4 bits, as the dense tensors that transformers' files have of them."""

import torch
from torch import Tensor, nn

from ..functional import dequantize
from ..nn.experts_layout import as_rows
from ..quantized_weight import QuantizedExperts
from .bin_files import BinFiles
from .experts_format import experts_from_tensors
from .key_conversion import group_tensors, put_back, take_apart
from .tensor_files import TensorFiles


class DecodedExperts:
    """One weight of a layer's experts, decoded when its first tensor is asked for.

    Args:
        key: what it is stored as.
        parts: the names of its tensors in `files`.
        model: on the meta device; its rules tell the dense tensors.

    Attributes:
        on_meta: the dense tensors' names, shapes and dtypes.

    Raises:
        ValueError: the model has no such weight, or it is damaged.
    """

    def __init__(self, key: str, parts: list[str], files: TensorFiles | BinFiles, model: nn.Module) -> None:
        self._key, self._parts, self._files, self._model = key, parts, files, model
        (group,) = group_tensors(model, [key], model.state_dict(keep_vars=True))
        self._name = group.target
        path, _, leaf = self._name.rpartition(".")
        self._module = dict(model.named_modules()).get(path, nn.Module())
        parameter = self._module._parameters.get(leaf)
        if parameter is None or parameter.dim() != 3:
            raise ValueError(f"the model must have experts for {key}, got none")
        self._shape = tuple(parameter.shape)
        self.dtype = self._packed().dtype
        self.on_meta = put_back(model, self._name, torch.empty(self._shape, dtype=self.dtype, device="meta"))
        self._made: tuple[torch.dtype, dict[str, Tensor]] = self.dtype, {}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A dense tensor of the experts' Ŵ; the others of that dtype wait until each was taken."""
        if self._made[0] != dtype or name not in self._made[1]:
            weight = torch.empty(self._shape, dtype=dtype)
            for qweight, rows in zip(self._packed(), as_rows(self._module, weight)):
                rows.copy_(dequantize(qweight, dtype))
            self._made = dtype, take_apart(self._model, self._name, weight)
        return self._made[1].pop(name)

    def _packed(self) -> QuantizedExperts:
        tensors = {name: self._files.read(name) for name in self._parts}
        shape = as_rows(self._module, torch.empty(self._shape, device="meta")).shape
        try:
            return experts_from_tensors(tensors, self._key, tuple(shape))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{self._key}: {error}") from None
