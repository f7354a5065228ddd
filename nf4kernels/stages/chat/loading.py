"""A directory, and the adapters on it, to the session that answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...integrations.transformers import Nf4Config
from ..errors import StageError, first_line
from .session import NO_ADAPTER, Sampling, Session

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load(
    model: Path,
    adapters: Sequence[str] = (),
    system: str | None = None,
    sampling: Sampling | None = None,
    dense: bool = False,
) -> Session:
    """Load a model and the adapters on it; the first adapter is the one that answers.

    Args:
        model: a Hugging Face directory, dense or in 4 bits, or the directory of an adapter, whose base is loaded.
        adapters: DIR or NAME=DIR; a name left out is the directory's.
        system: the system prompt, or None for what the chat template says by itself.
        sampling: how tokens are drawn; None is `Sampling()`.
        dense: leave a dense model as it is, rather than quantize it to NF4 as it loads.

    Raises:
        StageError: a directory is not what it must be, two adapters have one name, the adapter does not fit.
    """
    chosen = adapter_directories(adapters)
    base: Path | str = model
    if (model / "adapter_config.json").is_file():
        base = _base_of(model)
        if model.resolve() not in {directory.resolve() for directory in chosen.values()}:
            chosen = _with_names([(None, model), *chosen.items()])
    elif not (model / "config.json").is_file():
        raise StageError(f"MODEL must be a directory with a config.json or an adapter_config.json, got {model}")
    network = _load_base(base, dense)
    tokenizer = _load_tokenizer([model, base, *chosen.values()])
    for name, directory in chosen.items():
        try:
            if isinstance(network, PeftModel):
                network.load_adapter(str(directory), adapter_name=name)
            else:
                network = PeftModel.from_pretrained(network, str(directory), adapter_name=name)
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise StageError(f"the adapter {directory} must fit {base}: {first_line(error)}") from None
    if chosen:
        network.set_adapter(next(iter(chosen)))
    return Session(network.eval(), tokenizer, list(chosen), system, sampling)


def adapter_directories(adapters: Sequence[str]) -> dict[str, Path]:
    """{name: directory} of DIR or NAME=DIR; StageError where that is not what they are."""
    pairs: list[tuple[str | None, Path]] = []
    for adapter in adapters:
        name, equals, directory = adapter.partition("=")
        pairs.append((name, Path(directory)) if equals and not Path(adapter).exists() else (None, Path(adapter)))
    return _with_names(pairs)


def _with_names(pairs: Sequence[tuple[str | None, Path]]) -> dict[str, Path]:
    chosen: dict[str, Path] = {}
    for given, directory in pairs:
        name = directory.resolve().name.replace(".", "_") if given is None else given
        if not (directory / "adapter_config.json").is_file():
            raise StageError(f"--adapter must be a directory with an adapter_config.json, got {directory}")
        if not name or "." in name or name == NO_ADAPTER:
            raise StageError(
                f"--adapter NAME=DIR: NAME must have no dots and not be {NO_ADAPTER!r}, got {name!r} for {directory}"
            )
        if name in chosen:
            raise StageError(
                f"--adapter must have another name for each directory (NAME=DIR), got {name!r} for {chosen[name]} "
                f"and {directory}"
            )
        chosen[name] = directory
    return chosen


def _base_of(adapter: Path) -> Path | str:
    """A directory where there is one of that name, and else what the Hub calls it."""
    file = adapter / "adapter_config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise StageError(f"{file} must be a JSON object: {first_line(error)}") from None
    if not name or not isinstance(name, str):
        raise StageError(f"{file} must name its base, got {name!r}: give the base as MODEL and this as --adapter")
    for directory in (Path(name), adapter / name):
        if (directory / "config.json").is_file():
            return directory
    if Path(name).is_absolute() or name.startswith("."):
        raise StageError(
            f"{file} must name its base, got {name}, where no config.json is: give the base as MODEL and this as "
            "--adapter"
        )
    return name


def _load_base(base: Path | str, dense: bool) -> Any:
    try:
        stored = getattr(AutoConfig.from_pretrained(str(base)), "quantization_config", None)
        quantization = _quantization(base, stored, dense)
        options: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
        if quantization is not None:  # transformers takes None for a wish to forget the stored one
            options["quantization_config"] = quantization
        return AutoModelForCausalLM.from_pretrained(str(base), dtype="auto", **options)
    except StageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"MODEL must be a causal language model, got {base}: {first_line(error)}") from None


def _quantization(base: Path | str, stored: Any, dense: bool) -> Nf4Config | None:
    if stored is None:
        return None if dense else Nf4Config()
    if dense:
        raise StageError(f"--dense must be left out for a model that is in 4 bits already, got {base}")
    fields: Mapping[str, Any] = stored if isinstance(stored, Mapping) else stored.to_dict()
    if fields.get("quant_method") == "nf4kernels":
        return None
    config = Nf4Config()
    if fields.get("load_in_4bit"):
        config.block_size = None  # bitsandbytes' configuration does not say it, the weights do
    return config


def _load_tokenizer(directories: Sequence[Path | str]) -> Any:
    """The first that has a chat template, for a fine-tune may have brought one, or else the first."""
    found = []
    for directory in dict.fromkeys(map(str, directories)):
        if Path(directory).is_dir() and not any((Path(directory) / file).is_file() for file in TOKENIZER_FILES):
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise StageError(f"the tokenizer in {directory} must load: {first_line(error)}") from None
        if tokenizer.chat_template:
            return tokenizer
        found.append(tokenizer)
    if not found:
        raise StageError(f"MODEL must have a tokenizer beside it, got {directories[0]}")
    return found[0]
