"""A model or adapter directory in the layouts that other programs read: dense files, PEFT's safetensors."""

from pathlib import Path

from .atomic import replacing_directory
from .checkpoint import write_tensors
from .convert import CALLED, Words, check_outside, check_target, conversion_errors, copy_rest
from .merge_adapter import read_adapter_directory
from .model_directory import SIZE, opened_model
from .peft_format import WEIGHTS, read_stored_tensors
from .shards import Source


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
    with opened_model(source, out_dir, False, words) as directory:
        dense = directory.dense
        sources: list[Source] = [(name, dense.on_meta(name), dense.read) for name in dense.names]
        return directory.write(sources, None, max_shard_size, progress, "export")


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
