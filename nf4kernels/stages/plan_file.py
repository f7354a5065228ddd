"""The file of `nf4kernels recover plan`, where a verb gives each layer its options by it."""

from pathlib import Path

from ..recover.plan import Plan
from .errors import StageError


def read_plan(path: str | Path | None) -> Plan | None:
    """None for none.

    Raises:
        StageError: it is no plan, or asks for more than options of `nf4kernels.quantize`.
    """
    if path is None:
        return None
    try:
        plan = Plan.load(path)
    except ValueError as error:
        raise StageError(f"--plan: {error}") from None
    for name, candidate in plan.layers.items():
        if not candidate.is_plain or "lora" in (candidate.options or {}):
            raise StageError(
                "--plan must leave each layer one layer without an adapter (nf4kernels.recover.apply_plan makes"
                f" others), got {name}: {candidate.name}"
            )
    return plan
