"""The error that a verb ends with, and the one that every verb which computes may end with."""

from ..backends.select import decide


class CommandError(Exception):
    """What the user can put right, in one line; `main` prints it without a traceback."""


def check_cpu_computes(verb: str) -> None:
    """CommandError where the environment leaves the CPU without a backend: every op would be an error."""
    decision = decide("cpu")
    if decision.backend is None:
        raise CommandError(f"{verb}: the CPU must have a backend, got none: {decision.reason}")
