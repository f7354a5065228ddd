"""`measured.csv`: which backend takes an op, in a dtype and up to so many rows, where a measurement says so."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..ops import OPS

MEASURED = Path(__file__).parent / "measured.csv"
BACKENDS = ("native", "triton", "reference")
ANY_ROWS = 1 << 62


@dataclass(frozen=True)
class Rule:
    """A line of the table: up to `rows` rows of an op's first argument, in this dtype, go to `backend`."""

    op: str
    dtype: str
    rows: int
    backend: str
    reason: str

    def __str__(self) -> str:
        rows = "any rows" if self.rows == ANY_ROWS else f"up to {self.rows} rows"
        return f"{self.op} {self.dtype}, {rows}: {self.backend} ({self.reason})"


def rules_for(architecture: str, path: Path = MEASURED) -> list[Rule]:
    """An architecture's ("sm_90") lines, fewest rows first; an empty `rows` is any number.

    Raises ValueError for a line that names no op, dtype or backend of ours.
    """
    rules = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            is_dtype = isinstance(getattr(torch, line["dtype"], None), torch.dtype)
            if line["op"] not in OPS or line["backend"] not in BACKENDS or not is_dtype:
                raise ValueError(f"nf4kernels: {path.name} must have ops, dtypes and backends of ours, got {line}")
            if line["architecture"] == architecture:
                rows = int(line["rows"]) if line["rows"] else ANY_ROWS
                rules.append(Rule(line["op"], line["dtype"], rows, line["backend"], line["reason"]))
    return sorted(rules, key=lambda rule: rule.rows)


def by_rules(op: str, rules: list[Rule], kernels: dict[str, Callable], default: str) -> Callable:
    """The op by the first rule that fits its first argument, else by the default backend."""
    own = [rule for rule in rules if rule.op == op]

    def run(tensor, *arguments, **keywords):
        dtype, rows = str(tensor.dtype).removeprefix("torch."), tensor.shape[:-1].numel()
        fitting = (rule.backend for rule in own if rule.dtype == dtype and rows <= rule.rows)
        return kernels[next(fitting, default)](tensor, *arguments, **keywords)

    return run
