"""The error that every stage ends with, and what it says of another library's."""


class StageError(ValueError):
    """What the user can put right, in one line without the verb: what must be, and what came."""


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
