"""The page of a run on a GPU: what it is, what was checked, and what was predicted and came.

python -m benchmarks.gpu.page benchmarks/results/<gpu>.csv     the same, as <gpu>.md, of what is there by now
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..harness import BNB_DQ, DENSE, OURS, Row
from ..report import tables
from ..report.goals import WITHOUT_LORA, goal_rows, gpu_goals
from . import records
from .records import NOTE, REFUSED, WRONG, Record

APART = 0.2  # of the predicted time, from which a row is said to differ
STAGE = "stage"  # the records that `run` writes, of whole stages
SHOWN = 40  # records of what was wrong


def records_path(timings: Path) -> Path:
    """Beside the CSV of the times."""
    return timings.with_name(f"{timings.stem}-checks.csv")


def page(found: list[Record], rows: list[Row], about: dict[str, str]) -> str:
    """Markdown; `found` and `rows` may be those of a run that was cut off."""
    name = about.get("machine") or next((r.detail for r in found if r.case == "card"), "a GPU")
    parts = [f"# {name}", *_facts(found), *_stages(found), *_checks(found), *_timings(rows), *_goals(rows, about)]
    return "\n\n".join(parts) + "\n"


def _facts(found: list[Record]) -> Iterator[str]:
    notes = [(r.case, r.detail) for r in found if r.stage == "versions" and r.verdict == NOTE]
    if notes:
        yield tables.markdown(("", ""), notes)


def _stages(found: list[Record]) -> Iterator[str]:
    ended = [(r.case, r.verdict) for r in found if r.stage == STAGE]
    if ended:
        yield "## Stages"
        yield tables.markdown(("stage", "how it ended"), ended)


def _checks(found: list[Record]) -> Iterator[str]:
    checked = [r for r in found if r.stage not in (STAGE, "versions") and r.verdict != NOTE]
    if not checked:
        return
    counts: dict[str, Counter[str]] = {}
    for r in checked:
        counts.setdefault(r.stage, Counter())[r.verdict] += 1
    yield "## Checks"
    lines = [(stage, *(str(count[v]) for v in (records.OK, WRONG, REFUSED))) for stage, count in counts.items()]
    yield tables.markdown(("stage", "right", "wrong", "refused"), lines)
    wrong = [(r.stage, r.case, r.detail) for r in checked if r.verdict == WRONG]
    if wrong:
        yield tables.markdown(("wrong in", "what", ""), [tuple(map(_cell, line)) for line in wrong[:SHOWN]])
    if len(wrong) > SHOWN:
        yield f"and {len(wrong) - SHOWN} more."


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def apart(row: Row) -> float | None:
    """How far the measured time is from the predicted one, of which it is a share; None where nothing was predicted."""
    return None if not row.predicted_ms else row.ms[OURS] / row.predicted_ms - 1


def _timings(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    predicted = [row for row in rows if row.predicted_ms]
    differ = [row for row in predicted if abs(apart(row)) > APART]
    yield "## Times"
    yield (
        f"{len(differ)} of {len(predicted)} rows with a prediction differ from it by more than {APART:.0%}: in the "
        "column *came* they are bold. A ratio says how many times faster ours is."
    )
    yield tables.markdown(
        ("op", "shape", "M", "ms", "predicted", "came", "of floor", "bitsandbytes", "cuBLAS", "without LoRA"),
        map(_line, sorted(rows, key=lambda r: (r.op, r.shape, r.M or 0))),
    )


def _line(row: Row) -> tuple[str, ...]:
    came = apart(row)
    text = "" if came is None else f"{came:+.0%}"
    if came is not None and abs(came) > APART:
        text = f"**{text}**"
    ratios = (f"{row.ratios[side][1]:.2f}x" if side in row.ratios else "" for side in (BNB_DQ, DENSE, WITHOUT_LORA))
    predicted = f"{row.predicted_ms:.4f}" if row.predicted_ms else ""
    share = f"{row.share[1]:.0%}" if row.share else ""
    return (row.op, row.shape, str(row.M or ""), f"{row.ms[OURS]:.4f}", predicted, text, share, *ratios)


def _goals(rows: list[Row], about: dict[str, str]) -> Iterator[str]:
    if rows:
        yield "## Goals"
        share = 0.65 if about.get("is_hbm", "True") == "True" else 0.75
        yield tables.markdown(tables.GOAL_HEADER, goal_rows(rows, gpu_goals(share)))
    if rows and not any(BNB_DQ in row.ms for row in rows):
        yield f"bitsandbytes: {about.get('bitsandbytes', 'missing')}; its column is empty."


def write(timings: Path) -> Path:
    """The page of what is there by now; `timings` need not be."""
    rows, about = tables.read_csv(timings) if timings.exists() else ([], {})
    path = timings.with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(records.read(records_path(timings)), rows, about), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("timings", type=Path)
    print(f"written: {write(parser.parse_args().timings)}")


if __name__ == "__main__":
    main()
