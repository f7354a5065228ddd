"""The command line's errors of the import itself, which no code of a verb could catch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

PACKAGE = __name__.partition(".")[0]


@contextmanager
def command_line_ends_in_one_line() -> Iterator[None]:
    """Around an import: where this process is `nf4kernels VERB`, a ValueError is printed and the process ends with 2.

    Programs that import the package get the ValueError.
    """
    try:
        yield
    except ValueError as error:
        if not is_command_line(sys.argv, sys.orig_argv):
            raise
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def is_command_line(argv: list[str], orig_argv: list[str]) -> bool:
    """Whether a process of these arguments is the installed script, or `python -m nf4kernels`."""
    if argv[:1] == ["-m"]:  # while runpy looks for the module; its name is what follows, or the same word's rest
        return any(word.removeprefix("-m") == PACKAGE for word in orig_argv)
    return bool(argv) and PurePath(argv[0]).stem == PACKAGE
