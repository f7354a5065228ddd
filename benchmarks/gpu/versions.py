"""What this machine is: card, clocks, driver, CUDA, torch, Triton, nvcc, bitsandbytes.

python -m benchmarks.gpu.versions
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import nf4kernels as nf4

from .records import NOTE, Records

FACTS = ("driver_version", "clocks.max.sm", "clocks.sm", "clocks.max.mem", "power.limit", "temperature.gpu",
         "ecc.mode.current", "persistence_mode")  # fmt: skip
MISSING = "missing"


def facts(properties: object, ask: Callable[..., str]) -> Iterator[tuple[str, str]]:
    """(name, value) of a card's torch properties and of what the programs say that `ask` runs."""
    yield "card", properties.name
    yield "compute capability", f"{properties.major}.{properties.minor}"
    yield "multiprocessors", str(properties.multi_processor_count)
    yield "memory", f"{properties.total_memory / 2**30:.1f} GiB"
    yield "L2", f"{properties.L2_cache_size / 2**20:.0f} MiB"
    values = ask("nvidia-smi", f"--query-gpu={','.join(FACTS)}", "--format=csv,noheader", "--id=0").strip()
    if values == MISSING or values.count(",") != len(FACTS) - 1:
        yield "nvidia-smi", values.splitlines()[0] if values else MISSING
    else:
        yield from zip(FACTS, map(str.strip, values.split(",")))
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}"
    for package in ("triton", "bitsandbytes", "nf4kernels"):
        yield package, version(package)
    release = re.search(r"release ([\d.]+), V([\d.]+)", ask("nvcc", "--version"))
    yield "nvcc", release[2] if release else MISSING


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(nf4, "__version__", MISSING) if package == nf4.__name__ else MISSING


def ask(*command: str) -> str:
    """What a program prints; "missing" where it cannot be run or fails."""
    if shutil.which(command[0]) is None:
        return MISSING
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{MISSING}: {error}"
    return done.stdout if done.returncode == 0 else MISSING


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.versions", description=__doc__)
    parser.add_argument("--records", type=Path)
    records = Records("versions", parser.parse_args().records)
    for name, value in facts(torch.cuda.get_device_properties(0), ask):
        records.add(name, NOTE, value)
    records.add("processor", NOTE, f"{os.cpu_count()} threads")


if __name__ == "__main__":
    main()
