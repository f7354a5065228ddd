"""A directory, and the adapters on it, to the session that answers."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from ...storage.peft_format import CONFIG
from ..base_directory import directory_of, named_base
from ..causal_model import load_causal_model, load_tokenizer
from ..errors import StageError, first_line
from .session import NO_ADAPTER, Sampling, Session


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
    if (model / CONFIG).is_file():
        base = _base_of(model)
        if model.resolve() not in {directory.resolve() for directory in chosen.values()}:
            chosen = _with_names([(None, model), *chosen.items()])
    elif not (model / "config.json").is_file():
        raise StageError(f"MODEL must be a directory with a config.json or an adapter_config.json, got {model}")
    network = load_causal_model(base, dense)
    tokenizer = load_tokenizer([model, base, *chosen.values()])
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
        if not (directory / CONFIG).is_file():
            raise StageError(f"--adapter must be a directory with an {CONFIG}, got {directory}")
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
    instead = ": give the base as MODEL and this as --adapter"
    try:
        name, _ = named_base(adapter)
    except StageError as error:
        raise StageError(f"{error}{instead}") from None
    directory = directory_of(name, adapter)
    if directory is None and (Path(name).is_absolute() or name.startswith(".")):
        raise StageError(f"{adapter / CONFIG} must name its base, got {name}, where no config.json is{instead}")
    return name if directory is None else directory
