"""benchmarks.peer_tests: what it counts, and that a test which no longer passes is an error."""

import sys

from benchmarks import peer_tests

TESTS = """
import os, pytest

def test_4bit_same(): pass
def test_4bit_ours(): assert "OURS" in os.environ
def test_4bit_theirs(): assert "OURS" not in os.environ
def test_4bit_skipped(): pytest.skip("no GPU")
@pytest.mark.xfail
def test_4bit_known(): assert False
def test_other(): assert False
"""


def test_both_ways_are_run_and_compared(tmp_path, monkeypatch, capfd):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/__init__.py").touch()
    (tmp_path / "tests/test_ops.py").write_text(TESTS, encoding="utf-8")
    peer = peer_tests.Peer(("tests/test_ops.py",), "4bit", "os.environ['OURS'] = '1'")
    monkeypatch.setattr(peer_tests, "PEERS", {"other": peer})
    monkeypatch.setattr(sys, "argv", ["peer_tests", "other", str(tmp_path)])
    assert peer_tests.main() == 1
    lines = capfd.readouterr().out.splitlines()
    assert "| all | other | 5 | 2 | 1 | 1 | 1 |" in lines
    assert "| all | nf4kernels | 5 | 2 | 1 | 1 | 1 |" in lines
    assert lines[-2:] == [
        "no longer passes: tests.test_ops::test_4bit_theirs", "passes now: tests.test_ops::test_4bit_ours"
    ]  # fmt: skip
