"""A directory that bitsandbytes quantized to 4 bits to one of ours, and back; codes and scales stay the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codebook import DOUBLE_QUANT_CODEBOOKS
from ..model.heads import left_dense_by_loader
from ..model.plan import is_conv1d
from ..quantized_weight import QuantizedWeight
from .bitsandbytes_format import weight_to_tensors
from .convert_published import Published
from .directory_checks import CALLED, Words
from .key_conversion import group_tensors
from .model_directory import SIZE, ModelDirectory, ModelOf, is_of_bitsandbytes, opened_model
from .shards import Source


def convert_bitsandbytes(
    source: str | Path,
    out_dir: str | Path,
    model_of: ModelOf | None = None,
    overwrite: bool = False,
    max_shard_size: int = SIZE,
    progress: bool = True,
    words: Words = CALLED,
) -> Published:
    """Write a directory that transformers saved with bitsandbytes in 4 bits as one of ours, which decodes to the same.

    Packed codes in another `quant_storage` become bytes; all other tensors stay as they are. Every weight is checked
    before anything is written. One tensor is in memory at a time beside the output file being filled. Tokenizer,
    generation settings and the like are copied. `out_dir` appears when it is complete, or not at all.

    Args:
        source: the directory; what `nf4kernels quantize` writes is one, too.
        out_dir: a directory outside of it, which must not exist unless `overwrite` is set.
        model_of: given `source` and its config, (the model without its weights, on the meta device, and its class), or
            (None, why not). The model says which linear layers are dense.
        overwrite: replace `out_dir` if it holds a model.
        max_shard_size: bytes of an output file, at most, unless one tensor is larger.
        progress: show a progress bar on stderr.
        words: what messages call all this.

    Raises:
        ConversionError: the source is not bitsandbytes' in 4 bits, is damaged, or is what our format cannot hold;
            nothing was written.
        OSError: reading or writing failed.
    """
    with opened_model(source, out_dir, model_of, overwrite, words) as directory:
        if not is_of_bitsandbytes(directory.config):
            came = "a dense model" if directory.quantization is None else "one of nf4kernels"
            raise ValueError(f"{words.who}: {words.in_dir} must be in 4 bits of bitsandbytes, got {came}")
        scale_codebooks = _checked(directory, lambda weight, key: weight.scale_codebook, words)
        kinds = sorted({(w.codebook, w.block_size, w.double_quant) for w in directory.dense.packed.values()})
        if len(kinds) != 1:
            raise ValueError(
                f"{words.who}: {words.in_dir} must have one codebook, block size and kind of scales, got {kinds}"
            )
        ((codebook, block_size, double_quant),) = kinds
        named = [name for name in scale_codebooks if name in DOUBLE_QUANT_CODEBOOKS]
        quantization = {
            "quant_method": "nf4kernels", "codebook": codebook, "block_size": block_size, "double_quant": double_quant,
            "scale_codebook": named[0] if named else "dynamic8",
            "modules_to_not_convert": _layers(directory, words)[1],
        }  # fmt: skip
        return _write(directory, quantization, max_shard_size, progress)


def convert_to_bitsandbytes(
    source: str | Path,
    out_dir: str | Path,
    model_of: ModelOf | None = None,
    overwrite: bool = False,
    max_shard_size: int = SIZE,
    progress: bool = True,
    words: Words = CALLED,
) -> Published:
    """Write a directory in 4 bits so that transformers with bitsandbytes loads it, the codes and scales the same.

    Arguments, result and errors are those of `convert_bitsandbytes`, of a directory of ours; ConversionError too for
    weights that bitsandbytes has no format for.
    """
    with opened_model(source, out_dir, model_of, overwrite, words) as directory:
        if directory.quantization is None:
            raise ValueError(
                f"{words.who}: {words.in_dir} must be in 4 bits, got a dense model: nf4kernels quantize makes one"
            )
        _checked(directory, lambda weight, key: weight_to_tensors(weight, key, bitsandbytes=True), words)
        packed, dense = _layers(directory, words)
        clash = next((name for name in packed if left_dense_by_loader(name, dense)), None)
        if clash is not None:
            raise ValueError(
                f"{words.who}: {clash} must not end with the name of a dense layer, which transformers goes by"
            )
        first = next(iter(directory.dense.packed.values()))
        config = directory.config
        quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": first.codebook,
            "bnb_4bit_use_double_quant": first.double_quant,
            "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense,
        }
        return _write(directory, quantization, max_shard_size, progress)


def _checked(directory: ModelDirectory, check: Callable[[QuantizedWeight, str], Any], words: Words) -> list[Any]:
    """What `check` says of every weight in 4 bits, each of which is read; ValueError where there is none."""
    packed, experts = directory.dense.packed, directory.dense.experts
    if experts:
        raise ValueError(
            f"{words.who}: {words.in_dir} must have no experts in 4 bits, for which bitsandbytes has no format, got"
            f" {min(experts)}"
        )
    if not packed:
        raise ValueError(f"{words.who}: {words.in_dir} must have a weight in 4 bits, got none")
    return [check(directory.dense.read_packed(key), key) for key in packed]


def _layers(directory: ModelDirectory, words: Words) -> tuple[list[str], list[str]]:
    """(the linear layers in 4 bits, those that are dense), by the model's names; ValueError where it has others."""
    packed, model = directory.dense.packed, directory.model
    if model is None:  # an output layer may be tied, and then the files do not have it
        own = {key.removesuffix(".weight") for key in packed}
        names = [name for name in directory.dense.names if name.endswith(".weight") and name not in packed]
        dense = {name.removesuffix(".weight") for name in names if directory.dense.on_meta(name).dim() == 2}
        dense |= {"lm_head"} - own
    else:
        own = set()
        for group in group_tensors(model, packed, model.state_dict(keep_vars=True)):
            if group.converter is not None:
                raise ValueError(
                    f"{words.who}: {next(iter(group.sources))} must be dense, since the model has it inside of"
                    f" {group.target}, got 4 bits"
                )
            own.add(group.target.removesuffix(".weight"))
        linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) or is_conv1d(each)]
        dense = set(linear) - own
    return sorted(own), sorted(dense)


def _write(directory: ModelDirectory, quantization: dict[str, Any], size: int, progress: bool) -> Published:
    packed, files = directory.dense.packed, directory.files
    sources: list[Source] = []
    for name in files.names:
        if name in packed:
            on_meta = torch.empty(files.on_meta(name).nbytes, 1, dtype=torch.uint8, device="meta")
            sources.append((name, on_meta, _as_bytes(directory)))
        else:
            sources.append((name, files.on_meta(name), files.read))
    nbytes = directory.write(sources, quantization, size, progress, "convert")
    return Published(len(packed), next(iter(packed.values())).codebook, nbytes, [])


def _as_bytes(directory: ModelDirectory) -> Callable[[str], Tensor]:
    return lambda name: directory.files.read(name).contiguous().view(torch.uint8).reshape(-1, 1)
