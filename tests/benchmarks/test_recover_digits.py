"""The table of digits: every loss trains, on labels where there are any."""

import sys

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed: there are no digits")

from benchmarks.recover import digits
from nf4kernels.recover.batches import IGNORED


def test_the_table_has_a_row_for_each_loss(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["digits", "--seeds", "1", "--steps", "3", "--labelled", "100"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    digits.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[1:]] == ["teacher", *digits.LOSSES]
    assert all(0 <= float(row[1].split(" ")[0]) <= 100 for row in rows[1:])


def test_labels_are_those_of_the_first_images():
    x, y = torch.arange(300.0)[:, None], torch.arange(300) % 10
    made = digits.batches(x, y, 90)
    assert sum(len(batch["x"]) for batch in made) == 300
    for batch in made:
        number = batch["x"][:, 0].long()
        assert torch.equal(batch["labels"], torch.where(number < 90, number % 10, IGNORED))
