"""What the stages of `make gpu` found, a line each and written at once: a stage which is killed loses nothing."""

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path

OK, WRONG, REFUSED, NOTE = "ok", "WRONG", "refused", "note"


@dataclass(frozen=True)
class Record:
    stage: str
    case: str
    verdict: str  # of the above; of a whole stage how it ended
    detail: str = ""


class Records:
    """Appends to a CSV and prints; without a path it prints alone."""

    def __init__(self, stage: str, path: Path | None = None) -> None:
        self.stage, self.path, self.counts = stage, path, dict.fromkeys((OK, WRONG, REFUSED, NOTE), 0)

    def add(self, case: str, verdict: str, detail: str = "") -> None:
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        if self.path is not None:
            append(self.path, Record(self.stage, case, verdict, detail))
        if verdict != OK:
            print(f"{verdict}: {case}: {detail}", flush=True)

    @property
    def wrong(self) -> int:
        return self.counts[WRONG]

    def __str__(self) -> str:
        return ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items() if count)


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(field.name for field in fields(Record))
        writer.writerow(astuple(record))


def read(path: Path) -> list[Record]:
    """Nothing where there is no such file; a line that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return [Record(**line) for line in lines if None not in line.values() and None not in line]
