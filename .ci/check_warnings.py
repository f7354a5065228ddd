"""Compiles every C++ and CUDA file of csrc for its syntax alone, by the host's compiler, with warnings as errors.

On x86-64 alone: elsewhere the compiler does not know most files' instruction sets. Those of Arm are compiled by the
compiler of the tests in tests/arm, where there is one.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from arm import build as arm  # noqa: E402
from executor import build  # noqa: E402

from setup import ARM_ISAS, FLAGS, ISA_FLAGS, STABLE_ABI  # noqa: E402

WARNINGS = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
TORCH = [*STABLE_ABI, *(f"-isystem{path}" for path in include_paths())]


def arm_isa(source: Path) -> str | None:
    return next((isa for isa in ARM_ISAS if source.stem.endswith(f"_{isa}")), None)


def command(source: Path) -> list[str]:
    if isa := arm_isa(source):
        return [arm.CXX, *FLAGS, *ARM_ISAS[isa], *WARNINGS, str(source)]
    if source.suffix == ".cu" or source.stem.startswith("cuda"):  # as for the tests, which need no CUDA
        # there constructors name a parameter as the member that it fills
        return [
            build.CXX,
            *build.FLAGS,
            f"-I{build.CSRC}",
            *TORCH,
            *WARNINGS,
            "-Wshadow=local",
            "-x",
            "c++",
            str(source),
        ]
    isas = [isa for isa in ISA_FLAGS if source.stem.endswith(f"_{isa}")]
    return [build.CXX, *FLAGS, *TORCH, *(ISA_FLAGS[isas[0]] if isas else []), *WARNINGS, str(source)]


def warnings_of(source: Path) -> str:
    return subprocess.run(command(source), stderr=subprocess.PIPE, encoding="utf-8", check=False).stderr


if "avx2" not in ISA_FLAGS:
    sys.exit(print("warnings are looked for on x86-64 alone"))
with ThreadPoolExecutor(os.cpu_count()) as pool:
    sources = sorted(path for suffix in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{suffix}"))
    if shutil.which(arm.CXX) is None:
        print(f"the files of Arm are left out: they need {arm.CXX}")
        sources = [source for source in sources if arm_isa(source) is None]
    found = list(filter(None, pool.map(warnings_of, sources)))
print(*found, f"{len(sources)} files without a warning" if not found else "", sep="\n")
sys.exit(bool(found))
