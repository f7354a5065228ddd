"""The error that every stage ends with."""


class StageError(ValueError):
    """What the user can put right, in one line without the verb: what must be, and what came."""
