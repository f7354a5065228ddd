"""The error that a verb ends with."""


class CommandError(Exception):
    """What the user can put right, in one line; `main` prints it without a traceback."""
