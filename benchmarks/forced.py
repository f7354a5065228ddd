"""A smaller instruction set, forced on every side: what the same work takes on a processor that has no larger one.

The variables are read where each library is first loaded, so that a process of its own measures. ggml, which cannot be
told, is left out; bitsandbytes is told of bf16 instructions where they are forced, and dequantizes with AVX-512 always.
"""

import os
import subprocess
import sys
from pathlib import Path

import nf4kernels as nf4

from .harness import ROOT

LEVELS = {
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
# What is measured of each where nothing is selected: all dtypes at the first shape, bf16 at the second.
SHAPES = ((4096, 4096), (4096, 14336))
ROWS = {"linear": (1, 4, 16, 128), "linear_dgrad": (16, 128)}
SECONDS = 0.7  # a row; a peer whose one call takes longer is timed once


def lacks_bf16() -> bool:
    """Whether the level in force has no bf16 instructions."""
    return in_force() in ("avx512", "avx2")


def in_force() -> str:
    """The level that this process was started with, or ""."""
    level = os.environ.get("NF4KERNELS_CPU_ISA", "")
    return level if LEVELS.get(level, {"": ""}).items() <= os.environ.items() else ""


def environment(level: str) -> dict[str, str]:
    return os.environ | LEVELS[level] | {"NF4KERNELS_CPU_ISA": level}


def lesser_levels() -> list[str]:
    """Those that run here, below what runs by itself; none where one is forced already."""
    info = nf4.backend_info()
    active = info.devices["cpu"][0].removeprefix("native ")
    found = [level for level in LEVELS if level in info.cpu_isas and level != active]
    return [] if "NF4KERNELS_CPU_ISA" in os.environ else found


def restart(level: str) -> None:
    """This command again, in this process's place, with the level in force."""
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environment(level))


def measure(level: str, threads: int, path: Path) -> None:
    """A process with `level` in force measures ROWS and writes the CSV."""
    command = [sys.executable, "-m", "benchmarks", "--isa", level, "--threads", str(threads), "--csv", str(path)]
    subprocess.run(command, cwd=ROOT, env=environment(level), stdout=subprocess.DEVNULL, check=True)
