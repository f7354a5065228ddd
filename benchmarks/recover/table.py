"""The measured rows: a CSV that grows row by row, and the table made of it."""

import csv
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from nf4kernels.storage.atomic import replacing

from ..harness import ROOT
from ..report.tables import RESULTS, markdown
from .setting import Way

CSV = RESULTS / "recover.csv"
GUIDE = ROOT / "docs" / "recover.md"
MARKED = re.compile(r"(?<=<!-- recover -->\n).*?(?=<!-- end of recover -->)", flags=re.DOTALL)
BASE, PLAIN = "bf16", "NF4"  # what a gap is between


@dataclass(frozen=True)
class Record:
    """One way and seed; loss and KL in nats a token, top1 a share, `other` on text of another kind."""

    way: str
    seed: int
    megabytes: float  # of the model, adapters included
    bits: float  # a weight of the layers that quantize_model takes
    loss: float
    kl: float
    top1: float
    loss_other: float
    kl_other: float
    top1_other: float
    seconds: float  # of making it
    tokens: int  # held out, of each text
    machine: str
    commit: str
    date: str


def read(path: Path = CSV) -> list[Record]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Record(**{field.name: field.type(line[field.name]) for field in fields(Record)})  # type: ignore[operator]
            for line in csv.DictReader(file)
        ]


def write(records: Iterable[Record], path: Path = CSV) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(record).items()}
            for record in records
        )


def closed(kl: float, plain: float) -> str:
    """The share of NF4's KL that is gone."""
    return f"{100 * (1 - kl / plain):.0f} %" if plain else "-"


def spread(values: list[float], digits: int) -> str:
    """The mean; with several seeds the least and the most, too."""
    text = f"{fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(records: list[Record], ways: Iterable[Way]) -> str:
    """Markdown, a way a line, in the order of `ways`; what was not measured is left out."""
    of_way = {way.name: [r for r in records if r.way == way.name] for way in ways}
    plain = next((record for record in records if record.way == PLAIN), None)
    header = ("", "MB", "bits", "loss", "KL", "closed", "top-1", "KL, other text", "closed", "top-1", "s")
    lines = []
    for name, found in of_way.items():
        if not found:
            continue
        kl, kl_other = ([getattr(r, column) for r in found] for column in ("kl", "kl_other"))
        lines.append((
            name, spread([fmean([r.megabytes for r in found])], 1), f"{fmean([r.bits for r in found]):.2f}",
            spread([r.loss for r in found], 3), spread(kl, 3),
            closed(fmean(kl), plain.kl if plain else 0), f"{100 * fmean([r.top1 for r in found]):.1f} %",
            spread(kl_other, 3), closed(fmean(kl_other), plain.kl_other if plain else 0),
            f"{100 * fmean([r.top1_other for r in found]):.1f} %", f"{fmean([r.seconds for r in found]):.0f}",
        ))  # fmt: skip
    return markdown(header, lines)


def with_table(text: str, section: str) -> str:
    """The guide with `section` between its marks; ValueError where it has none."""
    made, count = MARKED.subn(lambda _: f"{section}\n", text)
    if count != 1:
        raise ValueError(f"the guide must have one place for the table, got {count}")
    return made
