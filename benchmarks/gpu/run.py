#!/usr/bin/env python3
"""Builds, checks, measures and tunes the CUDA kernels on this machine's GPU, in nine minutes and offline.

    python benchmarks/gpu/run.py                    or: make gpu
    python benchmarks/gpu/run.py --only build benchmark

Runs on a bare checkout with a Python that has torch for CUDA, and nvcc. Each stage is a process with a time of its own:
one that fails or runs out of time is said so and the next begins. The tests of a GPU come last and have what is left:
`--only build tests triton` gives them all of it. Leaves, in benchmarks/results, <gpu>.csv with the times,
<gpu>-checks.csv with what every stage found, and a page on both, <gpu>.md; each is written as the run goes on. What
`nf4kernels tune` measures goes to <gpu>-tuned.json there: this user's cache of such tables is neither read nor written.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
SANITIZED_BEGINS = "every op once on"  # what `sanitize` prints before its first kernel
GRACE_SECONDS = 8  # between asking a stage to end and killing it
MARGIN_SECONDS = 10  # of a stage's time, kept for its imports and for the case under way when it says that time is out


@dataclass(frozen=True)
class Stage:
    """A process: its command and the most seconds that it may take."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program without which the stage is skipped
    begins_with: str | None = None  # without this in what it prints, it was refused rather than failed
    leaves: float = 0.0  # seconds of the run for those that follow


def stages(architecture: str, tuned: Path = Path(os.devnull)) -> list[Stage]:
    """All of them for a GPU of that architecture, in order; `tuned` is the table that is measured."""
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k"]
    quiet = ["--report-api-errors", "no"]  # torch asks CUDA for functions that it may lack: no error of a kernel
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a tensor's end is then the end of an allocation
    return [
        Stage("versions", own("versions"), 20),
        Stage("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 120,
              {"TORCH_CUDA_ARCH_LIST": architecture}, needs="nvcc"),
        Stage("exact", own("exact", "--seconds", "{soft_seconds}"), 60),
        Stage("memcheck", [*sanitizer, "memcheck", *quiet, *SANITIZED], 50, uncached, "compute-sanitizer",
              SANITIZED_BEGINS),
        Stage("racecheck", [*sanitizer, "racecheck", *SANITIZED], 60, {}, "compute-sanitizer", SANITIZED_BEGINS),
        Stage("capture", own("capture"), 40),
        Stage("streams", own("streams", "--seconds", "{soft_seconds}"), 25),
        Stage("benchmark", [*own("measure")[:-2], "--seconds", "{seconds}"], 240, leaves=60),
        Stage("tune", [sys.executable, "-m", "nf4kernels", "tune", "--quick", "--output", str(tuned)], 60),
        Stage("paged", own("paged"), 30),
        Stage("tests", [*tests, "not triton"], 300),
        Stage("triton", [*tests, "triton"], 300),  # most of it Triton's compiler
    ]  # fmt: skip


def own(module: str, *more: str) -> list[str]:
    """A stage's own module, which writes to the records."""
    return [sys.executable, "-m", f"benchmarks.gpu.{module}", *more, "--records", "{records}"]


def architecture_of(capability: tuple[int, int]) -> str:
    """As TORCH_CUDA_ARCH_LIST names it; Hopper's own instructions need the "a"."""
    return "9.0a" if capability == (9, 0) else "{}.{}".format(*capability)


def run_stages(
    chosen: Iterable[Stage],
    seconds: float,
    records: Path = Path(os.devnull),
    note: Callable[[str, str], None] = lambda name, how: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """name -> how it ended, of every stage in order; all within `seconds`. Each is noted when it ends."""
    deadline, ended = clock() + seconds, {}
    for stage in chosen:
        left = min(stage.seconds, deadline - clock() - GRACE_SECONDS - stage.leaves)
        if left <= 0:
            ended[stage.name] = "skipped: no time left"
        elif stage.needs and not shutil.which(stage.needs, path=search_path()):
            ended[stage.name] = f"skipped: {stage.needs} is not on this machine"
        else:
            print(f"\n== {stage.name}, at most {left:.0f} s: {' '.join(stage.command)}", flush=True)
            ended[stage.name] = run_stage(stage, left, records)
        print(f"== {stage.name}: {ended[stage.name]}", flush=True)
        note(stage.name, ended[stage.name])
    return ended


def search_path() -> str:
    """PATH, and where the CUDA toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])


def formatted(stage: Stage, seconds: float, records: Path) -> list[str]:
    soft = max(1, int(seconds) - MARGIN_SECONDS)
    return [part.format(seconds=int(seconds), soft_seconds=soft, records=records) for part in stage.command]


def run_stage(stage: Stage, seconds: float, records: Path = Path(os.devnull)) -> str:
    """Prints what the process prints; says how it ended."""
    begin = time.monotonic()
    command = formatted(stage, seconds, records)
    environment = os.environ | {
        "PATH": search_path(), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "NF4KERNELS_CACHE": "",
    }  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment | stage.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    printed: list[str] = []

    def show() -> None:
        for line in process.stdout:
            printed.append(line)
            print(line, end="", flush=True)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"OUT OF TIME after {seconds:.0f} s"
    finally:  # also where this process is interrupted
        end_group(process)
        reader.join(GRACE_SECONDS)
    took = f"{time.monotonic() - begin:.0f} s"
    if process.returncode == 0:
        return f"ok in {took}"
    if stage.begins_with and stage.begins_with not in "".join(printed):
        reason = next((line.strip() for line in printed if "rror" in line or "upported" in line), "no reason given")
        return f"skipped: {stage.command[0]} refuses this device: {reason[:120]}"
    return f"FAILED with status {process.returncode} in {took}"


def end_group(process: subprocess.Popen) -> None:
    """Asks the process to end if it runs, with all that it started, then kills what is left of them."""
    try:
        if process.poll() is None:
            signal_group(process, signal.SIGTERM)
            process.wait(GRACE_SECONDS / 2)
    except subprocess.TimeoutExpired:
        pass
    finally:
        signal_group(process, signal.SIGKILL)
        process.wait()


def signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, number)


def find_device() -> tuple[str, str]:
    """(name, architecture) of the GPU; exits with the reason where there is none."""
    try:
        import torch
    except ImportError:
        sys.exit(f"{sys.executable} has no torch: run this with the Python that has torch for CUDA")
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device: nothing to build for, test or measure")
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    return name, architecture_of(torch.cuda.get_device_capability())


def tuned_path(timings: Path) -> Path:
    """Of the table of `nf4kernels tune`, beside the CSV of the times."""
    return timings.with_name(f"{timings.stem}-tuned.json")


def keep(timings: Path, chosen: Iterable[str]) -> Callable[[str, str], None]:
    """A function that records how a stage ended and writes the page anew; what the chosen ones left is deleted."""
    from benchmarks.gpu import page, records  # needs torch, which `find_device` has told of

    path, chosen = page.records_path(timings), set(chosen)
    before = [r for r in records.read(path) if (r.case if r.stage == page.STAGE else r.stage) not in chosen]
    for stage, old in ((None, path), ("benchmark", timings), ("tune", tuned_path(timings))):
        if stage is None or stage in chosen:
            old.unlink(missing_ok=True)
    for record in before:
        records.append(path, record)

    def note(name: str, how: str) -> None:
        records.append(path, records.Record(page.STAGE, name, how))
        try:
            page.write(timings)
        except Exception as error:  # the stages after it count for more
            print(f"no page: {type(error).__name__}: {error}", flush=True)

    return note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages("")]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="STAGE", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--seconds", type=float, default=530, help="for all stages together (default: %(default)s)")
    args = parser.parse_args()
    begin = time.monotonic()
    name, architecture = find_device()
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu.page import records_path
    from benchmarks.report.tables import csv_path

    timings = csv_path({"machine": name})
    chosen = [stage for stage in stages(architecture, tuned_path(timings)) if stage.name in args.only]
    note = keep(timings, args.only)
    ended = run_stages(chosen, args.seconds - (time.monotonic() - begin), records_path(timings), note)
    print(f"\nin {time.monotonic() - begin:.0f} s: " + "; ".join(f"{name}: {how}" for name, how in ended.items()))
    print(f"written: {timings.with_suffix('.md')}")
    if any(how.startswith(("FAILED", "OUT")) for how in ended.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
