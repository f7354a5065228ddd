"""make gpu without a GPU: its stages, and which tests they take."""

import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import run


def python(name: str, code: str, seconds: float = 60.0, **settings) -> run.Stage:
    return run.Stage(name, [sys.executable, "-c", code], seconds, **settings)


def test_stages_go_on_after_one_that_fails_is_refused_or_cannot_run(capsys):
    ended = run.run_stages(
        [
            python("works", "print('hello')"),
            python("fails", "raise SystemExit(3)"),
            python("lacks", "pass", needs="no-such-program"),
            python("refused", "raise SystemExit('Error: Device not supported')", begins_with="begins"),
            python("wrong", "print('begins'); raise SystemExit(1)", begins_with="begins"),
            python("told", "import os, sys; print(os.environ['NF4_TEST'], sys.argv)", environment={"NF4_TEST": "yes"}),
        ],
        seconds=60,
    )
    assert ended["works"].startswith("ok in")
    assert ended["fails"].startswith("FAILED with status 3")
    assert ended["lacks"] == "skipped: no-such-program is not on this machine"
    assert ended["refused"].startswith("skipped: ")
    assert ended["refused"].endswith("refuses this device: Error: Device not supported")
    assert ended["wrong"].startswith("FAILED with status 1")
    assert ended["told"].startswith("ok")
    printed = capsys.readouterr().out
    assert "hello\n" in printed
    assert "yes ['-c']" in printed


def test_a_stage_that_takes_too_long_is_ended_with_what_it_started(tmp_path, capsys):
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    ended = run.run_stages([python("endless", code, seconds=2.0), python("after", "print('after it')")], seconds=60)
    assert ended["endless"] == "OUT OF TIME after 2 s"
    assert ended["after"].startswith("ok")
    assert "begun\n" in capsys.readouterr().out
    before = alive.stat().st_mtime_ns
    time.sleep(0.3)
    assert alive.stat().st_mtime_ns == before, "what the stage started is still running"


def test_stages_share_the_time():
    now = [0.0]
    ended = run.run_stages([python("a", "pass"), python("b", "pass")], run.GRACE_SECONDS - 1, clock=lambda: now[0])
    assert ended == {"a": "skipped: no time left", "b": "skipped: no time left"}


def test_the_stages_of_make_gpu():
    stages = {stage.name: stage for stage in run.stages("9.0a")}
    assert list(stages) == ["build", "tests", "triton", "memcheck", "racecheck", "benchmark"]
    assert stages["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert sum(stage.seconds for stage in stages.values() if stage.name != "benchmark") <= 380
    assert stages["memcheck"].begins_with == run.SANITIZED_BEGINS
    assert (run.architecture_of((9, 0)), run.architecture_of((8, 6)), run.architecture_of((12, 0))) == (
        "9.0a", "8.6", "12.0",
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        run.find_architecture()


def test_the_tests_of_a_gpu_are_those_that_are_marked(pytestconfig):
    """Which `make gpu` runs: on CUDA's kernels, then on Triton's, of one property both; none of the other ways."""
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/contract/test_dequantize.py"]
    for expression, ids in (("not triton", {"cuda"}), ("triton", {"triton"})):
        command = [sys.executable, "-m", "pytest", *arguments, "-k", expression]
        result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
        found = [line for line in result.stdout.splitlines() if "::" in line]
        assert len(found) > 30
        assert {re.split(r"[-\]]", line.partition("[")[2])[0] for line in found} == ids
    assert run.stages("9.0a")[1].command[-2:] == ["-k", "not triton"]
