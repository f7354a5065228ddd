"""The error that a verb ends with, and the one those that several verbs may end with."""

from collections.abc import Iterable
from importlib.util import find_spec

from ..backends.select import decide


class CommandError(Exception):
    """What the user can put right, in one line; `main` prints it without a traceback."""


def check_cpu_computes(verb: str) -> None:
    """CommandError where the environment leaves the CPU without a backend: every op would be an error."""
    decision = decide("cpu")
    if decision.backend is None:
        raise CommandError(f"{verb}: the CPU must have a backend, got none: {decision.reason}")


def check_installed(verb: str, packages: Iterable[str], extra: str) -> None:
    """CommandError that names those of `packages` that are not installed; `extra` of this package brings them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        install = f"run: pip install 'nf4kernels[{extra}]'"
        raise CommandError(f"{verb}: {', '.join(missing)} must be installed, {install}")
