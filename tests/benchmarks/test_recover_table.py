"""The table of benchmarks/recover: its rows in a file, its spreads and shares, and the guide that shows it."""

from dataclasses import replace

import pytest

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the benchmarks have no peer")
pytest.importorskip("transformers", reason="transformers is not installed: no table is made")

from benchmarks.recover import table
from benchmarks.recover.setting import Way
from benchmarks.recover.table import Record
from benchmarks.recover.ways import WAYS

PLAIN = Record("NF4", 0, 111.7, 4.144, 3.3, 0.4, 0.75, 3.2, 0.2, 0.7, 1.5, 4064, "A CPU, 2 cores", "abc", "2026-11-29")


def way(name: str) -> Way:
    return Way(name, "start", lambda setting, seed: None)


def test_rows_come_back_from_a_file_as_they_were_written(tmp_path):
    records = [PLAIN, replace(PLAIN, way="LoRA, KL", seed=2)]
    table.write(records, tmp_path / "rows.csv")
    assert table.read(tmp_path / "rows.csv") == records
    assert table.read(tmp_path / "none.csv") == []


def test_seeds_are_one_line_with_their_spread_and_the_share_that_is_closed():
    trained = [replace(PLAIN, way="LoRA, KL", seed=seed, kl=kl, kl_other=0.3) for seed, kl in ((0, 0.1), (1, 0.3))]
    header, _, *lines = table.table([PLAIN, *trained], [way("NF4"), way("not measured"), way("LoRA, KL")]).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["NF4", "LoRA, KL"]
    cells = dict(zip(map(str.strip, header.split("|")), map(str.strip, lines[1].split("|"))))
    assert cells["KL"] == "0.200 (0.100-0.300)"
    assert cells["KL, other text"] == "0.300 (0.300-0.300)"
    assert lines[1].split("|")[6].strip() == "50 %"
    assert lines[1].split("|")[9].strip() == "-50 %", "what does not help stays in the table"


def test_every_way_has_a_name_of_its_own_and_every_row_a_way():
    names = [each.name for each in WAYS]
    assert len(set(names)) == len(names)
    seeds = {each.name: each.seeds for each in WAYS}
    for record in table.read():
        assert record.seed in seeds[record.way]


def test_the_guide_shows_the_rows_as_they_are():
    text = table.GUIDE.read_text(encoding="utf-8")
    assert "\n| NF4 " in text
    assert table.with_table(text, table.table(table.read(), WAYS)) == text


def test_a_table_takes_the_place_of_an_older_one_or_of_none():
    begin, end = "a\n<!-- recover -->\n", "<!-- end of recover -->\nb\n"
    for old in ("", "| old |\n"):
        assert table.with_table(begin + old + end, "| new |") == f"{begin}| new |\n{end}"
    with pytest.raises(ValueError, match="one place for the table, got 0"):
        table.with_table("a\nb\n", "| new |")
