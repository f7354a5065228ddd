"""A model directory, dense or in 4 bits, opened to be written as another one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .atomic import replacing_directory, write_json
from .bin_files import BIN, BIN_INDEX, BinFiles, bin_files
from .dense_tensors import DenseTensors
from .directory_checks import (
    ConversionError,
    Words,
    check_outside,
    check_target,
    conversion_errors,
    copy_rest,
    read_model_config,
)
from .shards import Source, write_shards
from .tensor_files import INDEX, TensorFiles, check_index, checkpoint_files

ModelOf = Callable[[Path, dict], tuple[nn.Module | None, str]]
SIZE = 5 * 10**9  # bytes of a file, at most


@dataclass(frozen=True)
class ModelDirectory:
    """What is read, and where it is written.

    Attributes:
        config: config.json's content.
        quantization: its quantization_config, None of a dense model.
        files: the tensors as they are stored.
        dense: the same, those in 4 bits decoded.
        model: without its weights, where it is known.
    """

    source: Path
    out_dir: Path
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    files: TensorFiles | BinFiles
    dense: DenseTensors
    model: nn.Module | None

    def write(
        self, sources: list[Source], quantization: Mapping[str, Any] | None, size: int, progress: bool, what: str
    ) -> int:
        """Write `sources` and all that is no tensor, with that quantization_config; the bytes of all tensors."""
        config = {name: value for name, value in self.config.items() if name != "quantization_config"}
        if quantization is not None:
            config["quantization_config"] = quantization
        with replacing_directory(self.out_dir) as staging:
            nbytes = write_shards(sources, staging, size, progress, what)
            write_json(staging / "config.json", config)
            copy_rest(self.source, staging)
        return nbytes


@contextmanager
def opened_model(
    source: str | Path, out_dir: str | Path, model_of: ModelOf | None, overwrite: bool, words: Words
) -> Iterator[ModelDirectory]:
    """`source`, to be written to `out_dir`, which is checked; errors of both are ConversionErrors.

    Raises:
        ConversionError: `source` is damaged or has another quantization, or `out_dir` exists.
    """
    source, out_dir = Path(source).resolve(), Path(out_dir).resolve()
    config = read_model_config(source, words)
    quantization = quantization_of(config, words)
    check_outside(source, out_dir, words)
    check_target(out_dir, overwrite, words)
    with conversion_errors(words), _opened_files(source, words.who) as files:
        model = None if model_of is None else model_of(source, dict(config))[0]
        dense = DenseTensors(files, words.who, model)
        yield ModelDirectory(source, out_dir, config, quantization, files, dense, model)


def has_bin_files(directory: Path) -> bool:
    """Whether the model's tensors are in `.bin` files, and in no safetensors."""
    is_new = any((directory / name).exists() for name in (INDEX, "model.safetensors"))
    return not is_new and any((directory / name).exists() for name in (BIN, BIN_INDEX))


def _opened_files(source: Path, who: str) -> TensorFiles | BinFiles:
    """The tensors in safetensors, or where there are none in `.bin`."""
    old = bin_files(source, who) if has_bin_files(source) else []
    files = BinFiles(old, who) if old else TensorFiles(checkpoint_files(source, who), who)
    check_index(source / (BIN_INDEX if old else INDEX), files.names, who)
    return files


def quantization_of(config: Mapping[str, Any], words: Words) -> dict[str, Any] | None:
    """quantization_config of a model in 4 bits that `DenseTensors` reads, None of a dense one; ConversionError else."""
    fields = _quantization(config)
    if fields is None or fields.get("quant_method") == "nf4kernels":
        return fields
    if is_of_bitsandbytes(config) and fields.get("load_in_4bit"):
        return fields
    came = "bitsandbytes in 8 bits (LLM.int8)" if fields.get("load_in_8bit") else fields.get("quant_method")
    raise ConversionError(
        f"{words.who}: {words.in_dir} must be dense or in 4 bits of nf4kernels or bitsandbytes, got one quantized by"
        f" {came}"
    )


def is_of_bitsandbytes(config: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes quantized the model, to 4 bits or 8; transformers has not always written a quant_method."""
    fields = _quantization(config) or {}
    method = fields.get("quant_method")
    return method == "bitsandbytes" or (
        method is None and bool(fields.get("load_in_4bit") or fields.get("load_in_8bit"))
    )


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    return dict(quantization) if isinstance(quantization, dict) else {"quant_method": quantization}
