"""Where the base of an adapter is on this machine."""

import json
from pathlib import Path

from ..storage.peft_format import CONFIG
from .errors import CommandError


def base_directory(given: str | None, adapter: Path, verb: str) -> Path:
    """The directory of --base, or of the base that the adapter names; CommandError where there is none here."""
    revision = None
    name = given
    if name is None:
        name, revision = _named_by(adapter, verb)
    if name is not None and Path(name).is_dir():
        return Path(name)
    found = None
    if name is not None:
        try:
            from ..stages.cached_model import cached_model
        except ImportError:  # without huggingface_hub there is no cache
            pass
        else:
            found = cached_model(name, revision)
    if found is None:
        who = "--base" if given is not None else f"{adapter / CONFIG} names the base, which"
        hint = "" if given is not None else " (give its directory with --base)"
        raise CommandError(f"{verb}: {who} must be a model directory on this machine, got {name!r}{hint}")
    return found


def _named_by(adapter: Path, verb: str) -> tuple[str | None, str | None]:
    file = adapter / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
    except OSError:
        raise CommandError(f"{verb}: ADAPTER must be a directory of PEFT's with {CONFIG}, got {adapter}") from None
    except (ValueError, AttributeError) as error:
        raise CommandError(f"{verb}: {file} must hold PEFT's configuration in JSON, got {error}") from None
    return (name if isinstance(name, str) and name else None), (revision if isinstance(revision, str) else None)
