#!/usr/bin/env python3
"""Builds, tests, checks and measures the CUDA kernels on this machine's GPU, in nine minutes and offline.

    python benchmarks/gpu/run.py                    or: make gpu
    python benchmarks/gpu/run.py --only build benchmark

Runs on a bare checkout with a Python that has torch for CUDA, and nvcc. Each stage is a process with a time of its own:
one that fails or runs out of time is said so and the next begins; time that a stage leaves goes to the benchmark, which
is last. Leaves benchmarks/results/<gpu>.csv and its pictures.
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
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
SANITIZED_BEGINS = "every op once on"  # what `sanitize` prints before its first kernel
GRACE_SECONDS = 8  # between asking a stage to end and killing it


@dataclass(frozen=True)
class Stage:
    """A process: its command and the most seconds that it may take."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program without which the stage is skipped
    begins_with: str | None = None  # without this in what it prints, it was refused rather than failed


def stages(architecture: str) -> list[Stage]:
    """All of them for a GPU of that architecture; the benchmark has what the others leave."""
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k"]
    quiet = ["--report-api-errors", "no"]  # torch asks CUDA for functions that it may lack: no error of a kernel
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a tensor's end is then the end of an allocation
    return [
        Stage("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 120,
              {"TORCH_CUDA_ARCH_LIST": architecture}, needs="nvcc"),
        Stage("tests", [*tests, "not triton"], 100),
        Stage("triton", [*tests, "triton"], 60),  # most of it Triton's compiler
        Stage("memcheck", [*sanitizer, "memcheck", *quiet, *SANITIZED], 50, uncached, "compute-sanitizer",
              SANITIZED_BEGINS),
        Stage("racecheck", [*sanitizer, "racecheck", *SANITIZED], 50, {}, "compute-sanitizer", SANITIZED_BEGINS),
        Stage("benchmark", [sys.executable, "-m", "benchmarks.gpu.measure", "--seconds", "{seconds}"], 540),
    ]  # fmt: skip


def architecture_of(capability: tuple[int, int]) -> str:
    """As TORCH_CUDA_ARCH_LIST names it; Hopper's own instructions need the "a"."""
    return "9.0a" if capability == (9, 0) else "{}.{}".format(*capability)


def run_stages(chosen: Iterable[Stage], seconds: float, clock: Callable[[], float] = time.monotonic) -> dict[str, str]:
    """name -> how it ended, of every stage in order; all within `seconds`."""
    deadline, ended = clock() + seconds, {}
    for stage in chosen:
        left = min(stage.seconds, deadline - clock() - GRACE_SECONDS)
        if left <= 0:
            ended[stage.name] = "skipped: no time left"
        elif stage.needs and not shutil.which(stage.needs, path=search_path()):
            ended[stage.name] = f"skipped: {stage.needs} is not on this machine"
        else:
            print(f"\n== {stage.name}, at most {left:.0f} s: {' '.join(stage.command)}", flush=True)
            ended[stage.name] = run_stage(stage, left)
        print(f"== {stage.name}: {ended[stage.name]}", flush=True)
    return ended


def search_path() -> str:
    """PATH, and where the CUDA toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])


def run_stage(stage: Stage, seconds: float) -> str:
    """Prints what the process prints; says how it ended."""
    begin = time.monotonic()
    command = [part.format(seconds=int(seconds)) for part in stage.command]
    environment = os.environ | {"PATH": search_path(), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment | stage.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
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
        end_group(process)
        return f"OUT OF TIME after {seconds:.0f} s"
    finally:
        reader.join(GRACE_SECONDS)
    took = f"{time.monotonic() - begin:.0f} s"
    if process.returncode == 0:
        return f"ok in {took}"
    if stage.begins_with and stage.begins_with not in "".join(printed):
        reason = next((line.strip() for line in printed if "rror" in line or "upported" in line), "no reason given")
        return f"skipped: {stage.command[0]} refuses this device: {reason[:120]}"
    return f"FAILED with status {process.returncode} in {took}"


def end_group(process: subprocess.Popen) -> None:
    """Asks the process and all that it started to end, then kills them."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS / 2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find_architecture() -> str:
    """Of the GPU; exits with the reason where there is none."""
    try:
        import torch
    except ImportError:
        sys.exit(f"{sys.executable} has no torch: run this with the Python that has torch for CUDA")
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device: nothing to build for, test or measure")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    return architecture_of(torch.cuda.get_device_capability())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages("")]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="STAGE", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--seconds", type=float, default=530, help="for all stages together (default: %(default)s)")
    args = parser.parse_args()
    begin = time.monotonic()
    chosen = [stage for stage in stages(find_architecture()) if stage.name in args.only]
    ended = run_stages(chosen, args.seconds - (time.monotonic() - begin))
    print(f"\nin {time.monotonic() - begin:.0f} s: " + "; ".join(f"{name}: {how}" for name, how in ended.items()))
    if any(how.startswith(("FAILED", "OUT")) for how in ended.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
