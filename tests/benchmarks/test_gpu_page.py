"""The records and the page of a run on a GPU, whole or cut off."""

import subprocess
import sys

from benchmarks.gpu import page, records
from benchmarks.gpu.records import NOTE, OK, REFUSED, WRONG, Record, Records
from benchmarks.harness import BNB_DQ, DENSE, OURS, Row
from benchmarks.report import tables


def row(M: int, ms: float, predicted: float | None, **ratios: float) -> Row:
    names = {"bnb": BNB_DQ, "dense": DENSE}
    found = {names[name]: (value,) * 3 for name, value in ratios.items()}
    times = {OURS: ms, **{side: ms * ratio[1] for side, ratio in found.items()}}
    return Row("linear", "4096x4096", M, 1, "out", times, found, 0.5 * ms, (0.5, 0.5, 0.5), predicted_ms=predicted)


def test_what_was_found_stays_when_the_process_is_killed(tmp_path):
    path = tmp_path / "gpu-checks.csv"
    code = (
        "import os, signal; from pathlib import Path; from benchmarks.gpu.records import Records\n"
        f"r = Records('exact', Path({str(path)!r})); r.add('one, \"two\"', 'ok'); r.add('three', 'WRONG', 'a\\nb')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert records.read(path) == [Record("exact", 'one, "two"', OK), Record("exact", "three", WRONG, "a\nb")]
    path.write_text(path.read_text(encoding="utf-8") + "exact,cut o", encoding="utf-8")
    assert len(records.read(path)) == 2
    assert records.read(tmp_path / "none") == []


def test_the_page_says_what_was_predicted_and_what_came(tmp_path):
    timings = tmp_path / "a-gpu.csv"
    rows = [row(1, 0.010, 0.009, bnb=1.5, dense=2.0), row(16, 0.020, 0.010), row(64, 0.005, 0.010), row(8, 1.0, None)]
    tables.write_csv(timings, rows, {"machine": "A GPU", "is_hbm": "False", "bitsandbytes": "0.50.2"})
    checks = Records("exact", page.records_path(timings))
    checks.add("case", OK)
    checks.add("other | case", WRONG, "error 1e-1")
    checks.add("third", REFUSED)
    Records("versions", page.records_path(timings)).add("driver_version", NOTE, "580.1")
    records.append(page.records_path(timings), Record(page.STAGE, "exact", "FAILED with status 1 in 3 s"))
    text = page.write(timings).read_text(encoding="utf-8")
    assert (tmp_path / "a-gpu.md").read_text(encoding="utf-8") == text
    assert text.startswith("# A GPU\n")
    for expected in (
        "| driver_version | 580.1 |",
        "| exact | FAILED with status 1 in 3 s |",
        "| exact | 1     | 1     | 1       |",
        "| exact    | other / case | error 1e-1 |",
        "2 of 3 rows with a prediction differ from it by more than 20%",
        "+11%",
        "**+100%**",
        "**-50%**",
        "| linear | 4096x4096 | 1  | 0.0100 | 0.0090    | +11%",
        "1.50x",
        ">= 75% of the floor",
    ):
        assert expected in text, expected
    assert "**+11%**" not in text
    assert "its column is empty" not in text


def test_a_page_can_be_made_of_what_there_is(tmp_path):
    timings = tmp_path / "a-gpu.csv"
    assert page.write(timings).read_text(encoding="utf-8") == "# a GPU\n"
    tables.write_csv(timings, [row(1, 0.01, None)], {"machine": "A GPU", "bitsandbytes": "missing"})
    assert "bitsandbytes: missing; its column is empty." in page.write(timings).read_text(encoding="utf-8")
