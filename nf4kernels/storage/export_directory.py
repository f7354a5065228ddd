"""A model or adapter directory in the layouts that other programs read: dense files, PEFT's safetensors."""

import json
from pathlib import Path

from .atomic import replacing_directory
from .directory_checks import CALLED, Words, check_outside, check_target, conversion_errors, copy_rest
from .model_directory import SIZE, ModelOf, opened_model
from .peft_format import CONFIG, WEIGHTS, adapter_weights, read_stored_tensors
from .shards import Source
from .tensor_files import write_tensors


def export_dense(
    source: str | Path,
    out_dir: str | Path,
    model_of: ModelOf | None = None,
    max_shard_size: int = SIZE,
    overwrite: bool = False,
    progress: bool = True,
    words: Words = CALLED,
) -> int:
    """Write a model directory with its 4-bit weights decoded, in files of at most `max_shard_size` bytes.

    Dense tensors stay as they are, so that a dense directory is cut into other files, or an old one gets safetensors
    for what it has in pytorch_model.bin. One tensor is in memory at a time, or one layer's experts, beside the output
    file being filled. The rest of the directory is copied, adapters in it are not. `out_dir` appears when complete.

    Returns:
        The bytes of all tensors.

    Raises:
        ConversionError: `source` is damaged, has experts in 4 bits that `model_of` does not know, or another
            quantization, or `out_dir` exists;
            nothing was written.
        OSError: reading or writing failed.
    """
    with opened_model(source, out_dir, model_of, overwrite, words) as directory:
        dense = directory.dense
        sources: list[Source] = [(name, dense.on_meta(name), dense.read) for name in dense.names]
        return directory.write(sources, None, max_shard_size, progress, "export")


def export_adapter(source: str | Path, out_dir: str | Path, words: Words = CALLED) -> int:
    """Write an adapter's directory of PEFT's with its tensors in safetensors, which an old one has in `.bin`.

    Adapters in directories inside of it, where PEFT saves those with names, are written likewise. All else is copied,
    but for what is neither of an adapter nor small (the state of an optimizer). Returns how many tensors.

    Raises:
        ConversionError: it is damaged or no adapter, or `out_dir` exists; nothing was written.
        OSError: reading or writing failed.
    """
    source, out_dir = Path(source).resolve(), Path(out_dir).resolve()
    check_outside(source, out_dir, words)
    check_target(out_dir, False, words)
    count = 0
    with conversion_errors(words):
        inside = [file.parent for file in sorted(source.rglob(CONFIG)) if file.parent != source]
        adapters = {each: adapter_weights(each, words.who, words.in_dir) for each in (source, *inside)}
        for directory in adapters:
            _check_config(directory / CONFIG, words.who)
        with replacing_directory(out_dir) as staging:
            for directory, weights in adapters.items():
                tensors = read_stored_tensors(weights, words.who)
                target = staging / directory.relative_to(source)
                target.mkdir(parents=True, exist_ok=True)
                write_tensors(tensors, target / WEIGHTS)
                count += len(tensors)
                copy_rest(directory, target, is_adapter=True)
    return count


def _check_config(file: Path, who: str) -> None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{who}: {file} must hold PEFT's configuration in JSON, got {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{who}: {file} must hold PEFT's configuration with a peft_type, got {config}")
