"""make gpu without a GPU: its stages, and which tests they take."""

import importlib
import inspect
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import page, records, run
from benchmarks.report import tables


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
    assert_ended(alive)


def endless_child(alive: Path, then: str) -> run.Stage:
    """A stage that starts a process which touches `alive` for ever and refuses to end, and then does something else."""
    child = "import time, signal, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    child += f"while True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    code = "import os, subprocess, sys, time\n"
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.DEVNULL)\n"
    code += f"while not os.path.exists({str(alive)!r}): time.sleep(0.01)\n{then}"
    return python("parent", code)


def assert_ended(alive: Path) -> None:
    before = alive.stat().st_mtime_ns
    time.sleep(0.3)
    assert alive.stat().st_mtime_ns == before, "what the stage started is still running"


@pytest.mark.parametrize(("then", "how"), [("pass", "ok in"), ("sys.exit(3)", "FAILED with status 3")])
def test_nothing_that_a_stage_started_runs_after_it(tmp_path, then, how):
    assert run.run_stage(endless_child(tmp_path / "alive", then), 60).startswith(how)
    assert_ended(tmp_path / "alive")


def test_an_interrupted_run_ends_its_stage(tmp_path, monkeypatch):
    alive, waited = tmp_path / "alive", subprocess.Popen.wait

    def interrupted(process, timeout=None):
        if timeout == 60:
            while not alive.exists():
                time.sleep(0.01)
            raise KeyboardInterrupt
        return waited(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_stage(endless_child(alive, "time.sleep(60)"), 60)
    assert_ended(alive)


def test_a_stage_has_time_to_say_that_time_is_out():
    found = {stage.name: run.formatted(stage, 25.0, Path("r.csv")) for stage in run.stages("9.0a")}
    for name in ("exact", "streams"):
        assert found[name][-4:] == ["--seconds", str(25 - run.MARGIN_SECONDS), "--records", "r.csv"]
    assert found["benchmark"][-2:] == ["--seconds", "25"], "it keeps more than that by itself"
    assert run.formatted(python("short", "{soft_seconds}"), 3.0, Path("r.csv"))[-1] == "1"


def test_no_stage_reads_or_writes_the_tables_of_this_user(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NF4KERNELS_CACHE", str(tmp_path))
    run.run_stage(python("cache", "import os; print(repr(os.environ['NF4KERNELS_CACHE']))"), 60)
    assert "''\n" in capsys.readouterr().out
    tuned = run.tuned_path(tmp_path / "a-gpu.csv")
    assert tuned == tmp_path / "a-gpu-tuned.json"
    stages = {stage.name: stage for stage in run.stages("9.0a", tuned)}
    assert stages["tune"].command[-2:] == ["--output", str(tuned)]


def test_stages_share_the_time():
    now = [0.0]
    ended = run.run_stages([python("a", "pass"), python("b", "pass")], run.GRACE_SECONDS - 1, clock=lambda: now[0])
    assert ended == {"a": "skipped: no time left", "b": "skipped: no time left"}


def test_a_stage_leaves_time_to_those_after_it():
    begin = run.GRACE_SECONDS + 100.0
    now = [0.0]
    stages = [python("long", "print('{seconds}')", 1000.0, leaves=60.0), python("short", "print('{seconds}')")]
    stages[0].command.append("{seconds}")
    ended = run.run_stages(stages[:1], begin, clock=lambda: now[0])
    assert ended["long"].startswith("ok")
    assert run.run_stages(stages[:1], run.GRACE_SECONDS + 60.0, clock=lambda: now[0])["long"].startswith("skipped")


def test_the_stages_of_make_gpu():
    stages = {stage.name: stage for stage in run.stages("9.0a")}
    assert list(stages) == [
        "versions", "build", "exact", "memcheck", "racecheck", "capture", "streams", "benchmark", "tune", "paged",
        "tests", "triton",
    ]  # fmt: skip
    assert stages["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    before = list(stages.values())[: list(stages).index("benchmark")]
    assert sum(stage.seconds for stage in before) + stages["benchmark"].leaves <= 440, "the times need 90 s"
    assert stages["memcheck"].begins_with == run.SANITIZED_BEGINS
    assert stages["tune"].command[1:] == ["-m", "nf4kernels", "tune", "--quick", "--output", os.devnull]
    assert (run.architecture_of((9, 0)), run.architecture_of((8, 6)), run.architecture_of((12, 0))) == (
        "9.0a", "8.6", "12.0",
    )  # fmt: skip


@pytest.mark.parametrize(
    "stage", [s for s in run.stages("9.0a") if "benchmarks.gpu" in " ".join(s.command)], ids=lambda s: s.name
)
def test_a_stages_command_is_one_that_its_module_takes(stage):
    """All but what it does: its arguments are parsed, and its own module is there."""
    command = run.formatted(stage, 1, os.devnull)
    command = command[command.index(sys.executable) :]
    module = importlib.import_module(command[2])
    assert hasattr(module, "main")
    for flag in (part for part in command[3:] if part.startswith("--")):
        assert f'"{flag}"' in inspect.getsource(module)


def test_what_each_stage_found_is_kept_and_the_page_written_after_it(tmp_path):
    timings = tmp_path / "a-gpu.csv"
    checks = page.records_path(timings)
    timings.write_text("of the last run", encoding="utf-8")
    for stage in ("exact", "streams"):
        records.append(checks, records.Record(stage, "old", records.OK))
        records.append(checks, records.Record(page.STAGE, stage, "ok in 1 s"))
    note = run.keep(timings, ["exact"])
    assert timings.read_text(encoding="utf-8") == "of the last run", "no benchmark is to run: its last one stays"
    assert [r.stage for r in records.read(checks)] == ["streams", page.STAGE]
    timings.unlink()
    code = "import sys; from pathlib import Path; from benchmarks.gpu.records import Records; "
    code += "Records('exact', Path(sys.argv[1])).add('new', 'ok')"
    stage = run.Stage("exact", [sys.executable, "-c", code, "{records}"], 60.0)
    run.run_stages([stage, python("benchmark", "raise SystemExit(1)")], 100.0, checks, note)
    found = [(r.stage, r.case) for r in records.read(checks)]
    assert found == [("streams", "old"), (page.STAGE, "streams"), ("exact", "new"), (page.STAGE, "exact"),
                     (page.STAGE, "benchmark")]  # fmt: skip
    text = (tmp_path / "a-gpu.md").read_text(encoding="utf-8")
    assert "FAILED with status 1" in text
    tuned = run.tuned_path(timings)
    tuned.touch()
    run.keep(timings, ["benchmark"])
    assert not timings.exists()
    assert tuned.exists()
    run.keep(timings, ["tune"])
    assert not tuned.exists()


def test_a_run_leaves_its_page_and_its_status(tmp_path, monkeypatch, capsys):
    stages = [python("exact", "print('checked')"), python("capture", "raise SystemExit(1)")]
    monkeypatch.setattr(run, "find_device", lambda: ("A Test GPU", "9.0a"))
    monkeypatch.setattr(run, "stages", lambda *settings: stages)
    monkeypatch.setattr(tables, "csv_path", lambda about: tmp_path / f"{about['machine']}.csv")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match="1"):
        run.main()
    text = (tmp_path / "A Test GPU.md").read_text(encoding="utf-8")
    assert "| exact   | ok in" in text
    assert "| capture | FAILED with status 1" in text
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "exact"])
    run.main()
    ended = [r.case for r in records.read(tmp_path / "A Test GPU-checks.csv")]
    assert ended == ["capture", "exact"], "of the stage that ran again its last end is gone"
    assert f"written: {tmp_path / 'A Test GPU.md'}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        run.find_device()


def test_the_tests_of_a_gpu_are_those_that_are_marked(pytestconfig):
    """Which `make gpu` runs: on CUDA's kernels, then on Triton's, of one property both; none of the other ways."""
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/contract/test_dequantize.py"]
    for expression, ids in (("not triton", {"cuda"}), ("triton", {"triton"})):
        command = [sys.executable, "-m", "pytest", *arguments, "-k", expression]
        result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, encoding="utf-8", check=True)
        found = [line for line in result.stdout.splitlines() if "::" in line]
        assert len(found) > 30
        assert {re.split(r"[-\]]", line.partition("[")[2])[0] for line in found} == ids
    stages = {stage.name: stage for stage in run.stages("9.0a")}
    assert stages["tests"].command[-2:] == ["-k", "not triton"]
