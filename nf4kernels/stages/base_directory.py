"""Where the base of an adapter is on this machine."""

import json
from pathlib import Path

from ..storage.peft_format import CONFIG
from .errors import StageError, first_line

try:
    from .cached_model import cached_model
except ImportError:  # without huggingface_hub there is no cache
    cached_model = None  # type: ignore[assignment]


def named_base(adapter: Path) -> tuple[str, str | None]:
    """(the base that adapter_config.json names, its revision); StageError where it names none."""
    file = adapter / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
    except OSError:
        raise StageError(f"ADAPTER must be a directory of PEFT's with {CONFIG}, got {adapter}") from None
    except (ValueError, AttributeError) as error:
        raise StageError(f"{file} must hold PEFT's configuration in JSON, got {first_line(error)}") from None
    if not isinstance(name, str) or not name:
        raise StageError(f"{file} must name its base, got {name!r}")
    return name, (revision if isinstance(revision, str) else None)


def directory_of(name: str, adapter: Path) -> Path | None:
    """The model directory that a base's name is, seen from here or from the adapter; None where there is none."""
    found = (path for path in (Path(name), adapter / name) if (path / "config.json").is_file())
    return next(found, None)


def base_directory(given: str | None, adapter: Path) -> Path:
    """The directory of the base that is given, or that the adapter names, in huggingface_hub's cache also.

    Raises:
        StageError: there is none on this machine; nothing is downloaded.
    """
    name, revision = (given, None) if given is not None else named_base(adapter)
    if given is not None and Path(given).is_dir():
        return Path(given)
    found = directory_of(name, adapter) if given is None else None
    if found is None and cached_model is not None:
        found = cached_model(name, revision)
    if found is None:
        who = "--base" if given is not None else f"{adapter / CONFIG} names the base, which"
        hint = "" if given is not None else " (give its directory with --base)"
        raise StageError(f"{who} must be a model directory on this machine, got {name!r}{hint}")
    return found
