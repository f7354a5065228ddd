"""A model or adapter directory in the layouts that other programs read: dense files, bitsandbytes', PEFT's."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .atomic import replacing_directory, write_json
from .bitsandbytes_format import names_of_weight, weight_to_tensors
from .checkpoint import write_tensors
from .convert import (
    CALLED,
    ConversionError,
    Words,
    check_outside,
    check_target,
    conversion_errors,
    copy_rest,
    read_model_config,
)
from .dense_tensors import DenseTensors
from .merge_adapter import SIZE, quantization_of, read_adapter_directory
from .peft_format import WEIGHTS, read_stored_tensors
from .shards import Source, write_shards
from .tensor_files import TensorFiles, checkpoint_files


def export_dense(
    source: str | Path,
    out_dir: str | Path,
    max_shard_size: int = SIZE,
    progress: bool = True,
    words: Words = CALLED,
) -> int:
    """Write a model directory with its 4-bit weights decoded, in files of at most `max_shard_size` bytes.

    Dense tensors stay as they are, so that a dense directory is cut into other files. One tensor is in memory at a time
    beside the output file being filled. The rest of the directory is copied. `out_dir` appears when it is complete.

    Returns:
        The bytes of all tensors.

    Raises:
        ConversionError: `source` is damaged, has experts in 4 bits or another quantization, or `out_dir` exists;
            nothing was written.
        OSError: reading or writing failed.
    """
    source, out_dir = Path(source).resolve(), Path(out_dir).resolve()
    config = read_model_config(source, words)
    quantization_of(config, words)
    check_outside(source, out_dir, words)
    check_target(out_dir, False, words)
    with conversion_errors(words), TensorFiles(checkpoint_files(source, words.who), words.who) as files:
        dense = DenseTensors(files, words.who)
        sources: list[Source] = [(name, dense.on_meta(name), dense.read) for name in dense.names]
        new = {name: value for name, value in config.items() if name != "quantization_config"}
        return _write(sources, new, source, out_dir, max_shard_size, progress)


def export_bitsandbytes(
    source: str | Path,
    out_dir: str | Path,
    max_shard_size: int = SIZE,
    progress: bool = True,
    words: Words = CALLED,
) -> int:
    """Write a model directory in 4 bits so that transformers with bitsandbytes loads it, the codes and scales the same.

    Arguments, result and errors are those of `export_dense`; ConversionError too for a dense directory, and for weights
    that bitsandbytes has no format for.
    """
    source, out_dir = Path(source).resolve(), Path(out_dir).resolve()
    config = read_model_config(source, words)
    if quantization_of(config, words) is None:
        raise ConversionError(f"{words.who}: {words.in_dir} must be in 4 bits, got a dense model")
    check_outside(source, out_dir, words)
    check_target(out_dir, False, words)
    with conversion_errors(words), TensorFiles(checkpoint_files(source, words.who), words.who) as files:
        dense = DenseTensors(files, words.who)
        if not dense.packed:
            raise ValueError(f"{words.who}: {words.in_dir} must have a weight in 4 bits, got none")
        for key in dense.packed:  # every one is read before anything is written
            weight_to_tensors(dense.read_packed(key), key, bitsandbytes=True)
        inner = {name for key in dense.packed for name in names_of_weight(files.names, key)}
        sources: list[Source] = [
            (name, files.on_meta(name), files.read) for name in files.names
            if name in inner or name in dense.names
        ]  # fmt: skip
        new = dict(config) | {"quantization_config": _bitsandbytes_config(dense, config)}
        return _write(sources, new, source, out_dir, max_shard_size, progress)


def export_adapter(source: str | Path, out_dir: str | Path, words: Words = CALLED) -> int:
    """Write a PEFT LoRA's directory with its tensors in safetensors, which an old one has in `.bin`; how many tensors.

    ConversionError where it is damaged, no LoRA, or `out_dir` exists; nothing was written.
    """
    source, out_dir = Path(source).resolve(), Path(out_dir).resolve()
    known = ("use_dora", "fan_in_fan_out", "lora_bias", "trainable_token_indices")  # they stay as they are
    check_outside(source, out_dir, words)
    check_target(out_dir, False, words)
    with conversion_errors(words):
        _, weights = read_adapter_directory(source, words.who, known)
        tensors = read_stored_tensors(weights, words.who)
        with replacing_directory(out_dir) as staging:
            write_tensors(tensors, staging / WEIGHTS)
            copy_rest(source, staging)
        return len(tensors)


def _write(
    sources: Iterable[Source], config: dict[str, Any], source: Path, out_dir: Path, size: int, progress: bool
) -> int:
    with replacing_directory(out_dir) as staging:
        nbytes = write_shards(sources, staging, size, progress, "export")
        write_json(staging / "config.json", config)
        copy_rest(source, staging)
    return nbytes


def _bitsandbytes_config(dense: DenseTensors, config: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(dense.packed.values()))
    stay = [
        name.removesuffix(".weight") for name in dense.names
        if name.endswith(".weight") and name not in dense.packed and dense.on_meta(name).dim() == 2
    ]  # fmt: skip
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.codebook,
        "bnb_4bit_use_double_quant": first.double_quant,
        "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(stay),
    }
