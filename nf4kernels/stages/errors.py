"""The error that every stage ends with, what it says of another library's, and of fields that do nothing."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any


class StageError(ValueError):
    """What the user can put right, in one line without the verb: what must be, and what came."""


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def refuse_unused(options: Any, needs: Iterable[tuple[str, bool, tuple[str, ...]]]) -> None:
    """StageError where a field of a dataclass is not its default and has no effect.

    Args:
        needs: (what makes fields take effect, whether it is there, their names).
    """
    defaults = {each.name: each.default for each in fields(options)}
    for what, is_there, names in needs:
        for name in () if is_there else names:
            if getattr(options, name) != defaults[name]:
                raise StageError(f"--{name} must come with {what}, got {getattr(options, name)} without")
