"""What others publish in 4 bits to a directory of ours, and MXFP4 back to what it came as; no weight changes."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.plan import is_conv1d
from .atomic import replacing_directory, write_json
from .bitsandbytes_format import stored_weight, stored_weights, weight_from_tensors
from .directory_checks import (
    CALLED,
    ConversionError,
    Words,
    check_outside,
    check_target,
    conversion_errors,
    copy_rest,
    read_model_config,
)
from .experts_format import experts_from_tensors, stored_experts
from .published import mxfp4
from .published.files import PublishedFiles, dtype_in
from .published.opening import GGUF, open_published
from .shards import Source, write_shards
from .tensor_files import TensorFiles, checkpoint_files

SHARD = 4 << 30  # bytes of a file, at most
NOT_COPIED = ("hf_quant_config.json", "quantize_config.json", "quantization_config.json")  # of the layout left behind
LAYER = re.compile(r"\.\d+\.")
Model = tuple[nn.Module | None, str]  # without weights, and who chose it


@dataclass(frozen=True)
class Published:
    """What `convert_published` or `convert_to_mxfp4` wrote.

    Attributes:
        weights: how many weights are in 4 bits; the two of a layer's experts count as two.
        codebook: their format.
        nbytes: of all tensors.
        ignored: names of scales of activations, which were left out.
    """

    weights: int
    codebook: str
    nbytes: int
    ignored: list[str]


def convert_published(
    source: str | Path,
    out_dir: str | Path,
    model_of: Callable[[Path, dict], Model],
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    words: Words = CALLED,
) -> Published:
    """Write what is published at `source` to `out_dir` as `save_checkpoint` stores it, its codes and scales unchanged.

    One weight at a time is read, or one layer's experts, beside the output file being filled. Tokenizer, generation
    settings and the like are copied. `out_dir` appears when it is complete, or not at all.

    Args:
        source: a directory in a published layout (see `load_checkpoint`), or a GGUF file.
        out_dir: a directory outside of it, which must not exist unless `overwrite` is set.
        model_of: given `source` and its config, (the model without its weights, on the meta device, and its class), or
            (None, why not). The model says what the file's matrices of each expert become.
        config: of the model; None reads source's config.json.
        overwrite: replace `out_dir` if it holds a model.
        progress: show a progress bar on stderr.
        words: what messages call all this.

    Raises:
        ConversionError: the source is not published in 4 bits, in a layout that is not read, or damaged; nothing was
            written.
        OSError: reading or writing failed.
    """
    source, out_dir = Path(source).resolve(), Path(out_dir).resolve()
    check_outside(source, out_dir, words)
    config = _read_config(source, words) if config is None else dict(config)
    model, _ = model_of(source, dict(config))
    check_target(out_dir, overwrite, words)
    with conversion_errors(words), open_published(source, model, words.who, dtype_in(config)) as files:
        if files is None:
            raise ValueError(f"{words.who}: {words.in_dir} must be published in 4 bits by others, got {source}")
        codebook, block_size = files.format
        quantization = {
            "quant_method": "nf4kernels", "codebook": codebook, "block_size": block_size, "double_quant": False,
            "modules_to_not_convert": _dense_layers(model, files),
        }  # fmt: skip
        with replacing_directory(out_dir) as staging:
            nbytes = write_shards(_as_they_are(files), staging, SHARD, progress, "convert")
            write_json(staging / "config.json", config | {"quantization_config": quantization})
            if source.is_dir():
                copy_rest(source, staging, NOT_COPIED)
        return Published(len(_keys(files)), codebook, nbytes, files.ignored)


def convert_to_mxfp4(
    source: str | Path, out_dir: str | Path, overwrite: bool = False, progress: bool = True, words: Words = CALLED
) -> Published:
    """Write a directory of ours in MXFP4 as others do: experts as gpt-oss's, linear layers as compressed-tensors'.

    What came in so comes out byte for byte. Arguments and errors are those of `convert_published`, and ConversionError
    also for weights in another format, and for experts beside linear layers, of which no layout has both.
    """
    source, out_dir = Path(source).resolve(), Path(out_dir).resolve()
    check_outside(source, out_dir, words)
    config = _read_config(source, words)
    check_target(out_dir, overwrite, words)
    with conversion_errors(words), TensorFiles(checkpoint_files(source, words.who), words.who) as files:
        experts, linear = stored_experts(files.names), stored_weights(files.names)
        if bool(experts) == bool(linear):
            came = "both" if experts else "neither"
            raise ValueError(f"{words.who}: {words.in_dir} must have experts or linear layers in 4 bits, got {came}")
        for key, parts in linear.items():
            found = stored_weight(parts, files.read, key, words.who)
            if found.codebook != "mxfp4" or found.has_column_order:
                raise ValueError(f"{words.who}: {key} must be in mxfp4 to be written so, got {found.codebook}")
        tensors = _in_mxfp4(files, experts, linear)
        packed = {name for parts in linear.values() for name in parts}
        dense = [name for name in files.names if name not in packed and not any(_is_of(name, key) for key in experts)]
        tensors += [(name, files.on_meta(name), files.read) for name in dense]
        with replacing_directory(out_dir) as staging:
            nbytes = write_shards(tensors, staging, SHARD, progress, "convert")
            quantization = _mxfp4_config(bool(experts), files, dense)
            write_json(staging / "config.json", config | {"quantization_config": quantization})
            copy_rest(source, staging)
        return Published(len(experts) + len(linear), "mxfp4", nbytes, [])


def _as_they_are(files: PublishedFiles) -> list[Source]:
    return [(name, files.on_meta(name), files.read) for name in files.names]


def _in_mxfp4(files: TensorFiles, experts: list[str], linear: dict[str, list[str]]) -> list[Source]:
    """The tensors of 4-bit weights, which are read when they are written."""
    sources: list[Source] = []
    for key in experts:
        E, N, half = files.on_meta(f"{key}.weight").shape
        shape = (E, N, 2 * half)

        def read(name: str, key: str = key, shape: tuple[int, ...] = shape) -> Tensor:
            own = {each: files.read(each) for each in files.names if each.startswith(f"{key}.")}
            return mxfp4.blocks_from_experts(experts_from_tensors(own, key, shape))[name.endswith("_scales")]

        groups = shape[2] // mxfp4.BLOCK
        sources.append((f"{key}_blocks", _on_meta(E, N, groups, mxfp4.BLOCK // 2), read))
        sources.append((f"{key}_scales", _on_meta(E, N, groups), read))
    for key, parts in linear.items():
        N, K = stored_weight(parts, files.read, key, "").shape

        def read_one(name: str, key: str = key, parts: list[str] = parts) -> Tensor:
            own = {each: files.read(each) for each in parts}
            return mxfp4.packed_from_weight(weight_from_tensors(own, key))[name.endswith("_scale")]

        sources.append((f"{key}_packed", _on_meta(N, K // 2), read_one))
        sources.append((f"{key}_scale", _on_meta(N, K // mxfp4.BLOCK), read_one))
    return sources


def _on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def _mxfp4_config(has_experts: bool, files: TensorFiles, dense: Iterable[str]) -> dict[str, Any]:
    """What transformers (gpt-oss) or compressed-tensors need to know of it."""
    layers = [
        name.removesuffix(".weight") for name in dense if name.endswith(".weight") and files.on_meta(name).dim() == 2
    ]
    if has_experts:
        patterns = sorted({LAYER.sub(".*.", name) for name in layers})
        return {"quant_method": "mxfp4", "modules_to_not_convert": patterns}
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": mxfp4.BLOCK}
    return {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": sorted(layers),
    }  # fmt: skip


def _read_config(source: Path, words: Words) -> dict[str, Any]:
    if source.suffix == GGUF:
        raise ConversionError(
            f"{words.who}: {words.in_dir} must bring the model's configuration, got a GGUF file alone"
        )
    return read_model_config(source, words)


def _keys(files: PublishedFiles) -> list[str]:
    """Of every weight in 4 bits."""
    return [*stored_weights(files.names), *files.experts]


def _is_of(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _dense_layers(model: nn.Module | None, files: PublishedFiles) -> list[str]:
    """The model's linear layers that are not in 4 bits."""
    if model is None:
        return []
    own = {key.removesuffix(".weight") for key in _keys(files)}
    linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) or is_conv1d(each)]
    return sorted(set(linear) - own)
