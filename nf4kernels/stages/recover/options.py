"""A dataclass's fields from a recipe and from flags, as `nf4kernels finetune` takes them."""

from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

from ..errors import StageError
from ..recipe_file import read_yaml

Options = TypeVar("Options")


class _Parser(HfArgumentParser):
    def error(self, message: str):  # argparse would print its usage and exit
        raise StageError(message.removeprefix("argument "))


def read_options(
    kind: type[Options], config: Path | None, flags: Sequence[str], aliases: Mapping[str, str] | None = None
) -> Options:
    """A `kind` of the fields in a YAML file of FIELD: VALUE, if any, and of flags as `--share 0.25`, which win.

    Raises:
        StageError: the file is no mapping, a name is no field's, or a value is none of its field's.
    """
    aliases = aliases or {}
    parser = _parser(kind, aliases)
    known = {action.dest for action in parser._actions if action.dest != SUPPRESS}
    settings = {} if config is None else read_yaml(config)
    for name in settings:
        if name not in known and name not in aliases:
            raise StageError(f"--config {config}: {_unknown(name, known)}")
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name.removeprefix("no_") not in known and name not in (*known, *aliases):
            raise StageError(_unknown(name, known, "--"))
    given = [word for name, value in settings.items() for word in _as_flags(aliases.get(name, name), value)]
    if given:
        try:
            parser.parse_args(given)
        except StageError as error:
            raise StageError(f"--config {config}: {error}") from None
    return kind(**vars(parser.parse_args([*given, *flags])))


def field_help(kind: type, verb: str, aliases: Mapping[str, str] | None = None) -> str:
    """Every field with its default and what it does."""
    parser = _parser(kind, aliases or {})
    parser.prog, parser.usage = verb, f"{verb} [--config FILE] [--FIELD VALUE ...]"
    return parser.format_help()


def _parser(kind: Any, aliases: Mapping[str, str]) -> _Parser:
    parser = _Parser([kind], allow_abbrev=False, add_help=False)
    for alias, name in aliases.items():
        parser.add_argument(f"--{alias}", dest=name, default=SUPPRESS, help=f"the same as --{name}")
    return parser


def _as_flags(name: str, value: Any) -> list[str]:
    """YAML's value as a person would type it."""
    if value is None:
        return []
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def _unknown(name: str, known: set[str], dashes: str = "") -> str:
    close = get_close_matches(name, known, 1)
    hint = f"; did you mean {dashes}{close[0]}?" if close else ""
    return f"{dashes}{name} must be one of the fields that --help-fields lists, got an unknown name{hint}"
