"""What is in files of examples, before a model is trained on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from ..errors import StageError, first_line
from .reading import Example, identity, other_shape, walk
from .view import Viewer, marked

LISTED = 5  # broken examples that are named


@dataclass(frozen=True)
class Lengths:
    """Of one example, in characters or tokens."""

    least: int
    median: float
    p95: int
    most: int


@dataclass
class Report:
    """What `check` found: `broken` names the first few of `broken_count`, `cut` counts examples of more than max_length
    tokens, `duplicates` those that are there before."""

    files: dict[str, int]
    forms: dict[str, int]
    duplicates: int = 0
    broken_count: int = 0
    broken: list[str] = field(default_factory=list)
    characters: Lengths | None = None
    tokens: Lengths | None = None
    token_count: int | None = None
    cut: int | None = None
    example: str | None = None

    @property
    def good(self) -> bool:
        return not self.broken_count


def check(paths: Sequence[Path], model: Path | None = None, max_length: int | None = None) -> Report:
    """Counts, lengths, duplicates and broken examples of all files, and one example as the tokenizer of `model` has it.

    Raises:
        StageError: a file is not there or is none of examples, or `model` has no tokenizer.
    """
    tokenizer = None if model is None else _tokenizer(model)
    report = Report({}, {})
    rows: list[tuple[str, str, dict[str, Any]]] = []
    shapes: Counter[str] = Counter()
    first: Example | None = None
    for path in paths:
        before, broken = len(rows), report.broken_count
        for found in walk(path):
            if found.row is None:
                _note(report, f"{found.where}: {found.problem}")
                continue
            first = first or found
            if found.shape != first.shape and found.shape not in shapes:  # one line a shape, not one an example
                _note(report, f"{found.where}: {other_shape(found, first)}")
            shapes[found.shape] += 1
            rows.append((found.where, found.form, found.row))
        report.files[str(path)] = len(rows) - before
        if len(rows) == before and report.broken_count == broken:
            _note(report, f"{path} must hold examples, got none")
    report.forms = dict(shapes)
    report.duplicates = len(rows) - len({identity(row) for _, _, row in rows})
    if rows:
        report.characters = _lengths([_characters(row) for _, _, row in rows])
    if rows and tokenizer is not None:
        _view(report, rows, tokenizer, max_length)
    return report


def _view(report: Report, rows: list, tokenizer: Any, max_length: int | None) -> None:
    viewers: dict[str, Viewer] = {}
    for form in {form for _, form, _ in rows}:
        try:
            viewers[form] = Viewer(tokenizer, form)
        except StageError as error:
            _note(report, str(error))
    lengths = []
    for where, form, row in rows:
        if form not in viewers:
            continue
        try:
            view = viewers[form].view(row)
        except StageError as error:
            _note(report, f"{where}: {error}")
            continue
        lengths.append(len(view.ids))
        if report.example is None:
            report.example = marked(view, tokenizer)
    if lengths:
        report.tokens, report.token_count = _lengths(lengths), sum(lengths)
        report.cut = None if max_length is None else sum(length > max_length for length in lengths)


def _note(report: Report, problem: str) -> None:
    report.broken_count += 1
    if len(report.broken) < LISTED:
        report.broken.append(problem)


def _tokenizer(model: Path) -> Any:
    if not model.is_dir():
        raise StageError(f"--model must be a Hugging Face directory with a tokenizer, got {model}")
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # what transformers raises about a directory has no common type
        raise StageError(f"--model must be a directory with a tokenizer, got {model}: {first_line(error)}") from None


def _characters(row: Any) -> int:
    if isinstance(row, str):
        return len(row)
    if isinstance(row, dict):
        return sum(_characters(value) for name, value in row.items() if name not in ("role", "images"))
    return sum(map(_characters, row)) if isinstance(row, list) else 0


def _lengths(lengths: list[int]) -> Lengths:
    ordered = sorted(lengths)
    return Lengths(ordered[0], median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)], ordered[-1])
