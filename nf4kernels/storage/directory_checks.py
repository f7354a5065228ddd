"""From one model directory to another: what every such conversion checks, copies, and calls its arguments."""

import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import TargetError, copy_file
from .peft_format import CONFIG

OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".index.json",
)  # fmt: skip

TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", *TEMPLATES,
)  # fmt: skip


class ConversionError(ValueError):
    """What the caller can put right, in one line; nothing was written."""


@dataclass(frozen=True)
class Words:
    """What messages call the function and its arguments: a command line has words of its own for them."""

    who: str = "nf4kernels.storage.convert.convert_directory"
    in_dir: str = "in_dir"
    out_dir: str = "out_dir"
    skip: str = "skip"
    overwrite: str = "overwrite=True"
    plan: str = "plan"


CALLED = Words()


@contextmanager
def conversion_errors(words: Words) -> Iterator[None]:
    """Within it a ValueError becomes a ConversionError that begins with the function's name, and names out_dir."""
    try:
        yield
    except TargetError as error:
        raise ConversionError(f"{words.who}: {words.out_dir} {error}") from None
    except ConversionError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConversionError(text if text.startswith(words.who) else f"{words.who}: {text}") from None


def read_model_config(in_dir: Path, words: Words) -> dict[str, Any]:
    """config.json's content; ConversionError where there is none."""
    file = in_dir / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(
            f"{words.who}: {words.in_dir} must be a Hugging Face model directory, got {error}"
        ) from None
    except ValueError as error:
        raise ConversionError(f"{words.who}: {file} must hold JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{words.who}: {file} must hold a JSON object, got {type(config).__name__}")
    return config


def check_outside(source: Path, out_dir: Path, words: Words) -> None:
    """ConversionError where one of the two is inside of the other."""
    if source == out_dir or source in out_dir.parents or out_dir in source.parents:
        raise ConversionError(f"{words.who}: {words.out_dir} must be outside {words.in_dir}, got {out_dir}")


def check_target(target: Path, overwrite: bool, words: Words) -> None:
    if not target.exists():
        return
    if not overwrite:
        unless = f" (or say {words.overwrite})" if words.overwrite else ""
        raise ConversionError(f"{words.who}: {words.out_dir} must not exist{unless}, got {target}")
    weights = any(target.glob("*.safetensors")) if target.is_dir() else False
    if not weights or not (target / "config.json").is_file():
        expected = f"{words.out_dir} must be a model directory to be overwritten"
        raise ConversionError(f"{words.who}: {expected}, got {target} without model files")


def copy_rest(in_dir: Path, staging: Path, left: Collection[str] = (), is_adapter: bool = False) -> None:
    """Tokenizer, generation settings and the like; no weights in other formats, nothing hidden, no file of `left`.

    Adapters in directories inside of it stay behind, and so does the configuration of one that lies beside a model:
    without its tensors it would lead loaders astray. A warning names them. Where `is_adapter`, in_dir is an adapter
    itself.
    """
    found = {file.parent for file in in_dir.rglob(CONFIG)}
    adapters = found - {in_dir}
    if stays := sorted(map(str, adapters if is_adapter else found)):
        warnings.warn(
            f"adapters are not copied with a model, these stay where they are: {', '.join(stays)}", stacklevel=3
        )
    left = left if is_adapter else (*left, CONFIG)
    for source in sorted(in_dir.rglob("*")):
        inside = source.relative_to(in_dir)
        target = staging / inside
        hidden = any(part.startswith(".") for part in inside.parts)
        left_out = source.name in left or source.name.endswith(OTHER_WEIGHTS) or not adapters.isdisjoint(source.parents)
        if hidden or left_out or not source.is_file() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, target)


def copy_tokenizer(adapter: Path, staging: Path) -> list[str]:
    """The tokenizer and the chat template that an adapter brings, before `copy_rest` copies its base's; their names."""
    found = [name for name in TOKENIZER if (adapter / name).is_file()]
    for name in found:
        copy_file(adapter / name, staging / name)
    return found


def has_template(adapter: Path) -> bool:
    """Whether an adapter's tokenizer has a chat template, in a file of its own or in tokenizer_config.json."""
    if any((adapter / name).is_file() for name in TEMPLATES):
        return True
    file = adapter / "tokenizer_config.json"
    if not file.is_file():
        return False
    config = json.loads(file.read_text(encoding="utf-8"))
    return isinstance(config, dict) and bool(config.get("chat_template"))
