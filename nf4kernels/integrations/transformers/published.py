"""What others publish in 4 bits, as transformers' loader is given it: lazily, by the names that a saved model has."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...nn.grouped_quant_linear import GroupedQuantLinear
from ...storage.names import listed
from ...storage.published.files import PublishedFiles, quantization_of
from ...storage.published.layouts import layout_of
from ...storage.tensor_files import TensorFiles
from .config import Nf4Config

WHO = "nf4kernels.Nf4Config"
WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8", "int32": "I32", "int64": "I64"}
logger = logging.getLogger(__name__)


def published_files(
    opened: TensorFiles, checkpoint_files: Iterable[str] | None, config: Nf4Config, model: Any
) -> PublishedFiles | None:
    """The opened files by our names, where the config.json beside them is of a published layout; None where it is not.

    ValueError for a layout that is not read, and for what `config` cannot choose any more.
    """
    files = list(checkpoint_files or ())
    fields = quantization_of(Path(files[0]).parent) if files else None
    if fields is None:
        return None
    usual = Nf4Config()
    for field in ("codebook", "block_size", "double_quant", "scale_codebook", "skip"):
        asked, default = getattr(config, field), getattr(usual, field)
        if asked != default:
            expected = f"{field} must be left out for a checkpoint that is in 4 bits already"
            raise ValueError(f"{WHO}: {expected}, got {asked!r}")
    try:
        published = PublishedFiles(opened, layout_of(fields), model, model.dtype)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(WHO) else f"{WHO}: {text}") from None
    if published.ignored:
        logger.warning(f"nf4kernels: scales of activations are left out: {listed(published.ignored)}")
    return published


def check_not_on_disk(device_map: Any) -> None:
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    if "disk" in devices:
        raise ValueError(
            f"{WHO}: device_map must not offload to disk what others publish in 4 bits: convert it first (`nf4kernels"
            " convert`), then load that, got a part on 'disk'"
        )


class LazyTensor:
    """A tensor as safetensors' slices are: read when it is indexed."""

    def __init__(self, files: PublishedFiles, name: str) -> None:
        self._files, self._name = files, name

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self._files.read(self._name)[index]
        except ValueError as error:
            raise ValueError(f"{WHO}: {error}") from None

    def get_shape(self) -> list[int]:
        return list(self._files.on_meta(self._name).shape)

    def get_dtype(self) -> str:
        """In the words of safetensors, of which the loader asks the first letter."""
        word = str(self._files.on_meta(self._name).dtype).removeprefix("torch.")
        return WORDS.get(word, word.upper())


def slices(files: PublishedFiles) -> dict[str, LazyTensor]:
    return {name: LazyTensor(files, name) for name in files.names}


def take_bytes_as_they_are(model: nn.Module) -> None:
    """Record the checksums of experts, which a published checkpoint does not have."""
    for module in model.modules():
        if isinstance(module, GroupedQuantLinear) and not module.weight.is_meta:
            module.record_bytes()
