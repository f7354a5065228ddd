"""Compiles csrc/cpu for aarch64, by a compiler that runs here, into a program that qemu runs: build/arm/ops."""

import shutil
import subprocess
from pathlib import Path

from executor.build import locked
from torch.utils.cpp_extension import include_paths

from setup import (
    ARM_ISAS,
    BUILD,
    CPU_BINDINGS,
    CPU_SOURCES,
    FLAGS,
    ROUNDED_CODE,
    STABLE_ABI,
    compile_changed,
    run_if_changed,
    sources_of,
)

QEMU, CXX = "qemu-aarch64", "aarch64-linux-gnu-g++"
OBJDUMP, NM = (CXX.replace("g++", tool) for tool in ("objdump", "nm"))
FOLDER = BUILD / "arm"
ISAS = {"scalar": [], **ARM_ISAS}
ISA_SOURCES = {source: isa for isa in ISAS for source in sources_of(isa)}


def missing(*tools: str) -> str:
    """Why these cannot be run here; empty where they can."""
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return f"needs {' and '.join(absent)} (Debian: g++-aarch64-linux-gnu and qemu-user)" if absent else ""


def commands() -> dict[str, list[str]]:
    """What compiles each file, as setup.py does on such a machine."""
    found = {source: [CXX, *FLAGS] for source in (*CPU_SOURCES, ROUNDED_CODE)}
    return found | {source: [CXX, *FLAGS, *ISAS[isa]] for source, isa in ISA_SOURCES.items()}


def build() -> Path:
    """The program, of what changed since it was last built; static, so that it needs no libraries of its machine."""
    with locked(_folder() / "lock"):
        own = {"tests/arm/ops.cpp": [CXX, *FLAGS, "-Icsrc"]}
        objects = compile_changed(commands() | own, FOLDER)
        program = FOLDER / "ops"
        run_if_changed([CXX, "-static", *objects, "-o", str(program)], program, lambda: objects)
    return program


def build_library() -> Path:
    """nf4kernels' CPU library with its bindings, by torch's headers of this machine, which name no processor."""
    include = [flag for path in include_paths() for flag in ("-isystem", path)]
    with locked(_folder() / "lock"):
        bindings = {source: [CXX, *FLAGS, *STABLE_ABI, *include] for source in CPU_BINDINGS}
        objects = compile_changed(commands() | bindings, FOLDER)
        library = FOLDER / "_cpu.so"
        run_if_changed([CXX, "-shared", *objects, "-o", str(library)], library, lambda: objects)
    return library


def _folder() -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    return FOLDER


def symbols(file: Path, *options: str) -> list[str]:
    """nm's lines: an address where there is one, a kind, a name."""
    command = [NM, "--demangle", *options, str(file)]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()


def instructions(program: Path) -> list[str]:
    """objdump's lines of the program, without the bytes."""
    command = [OBJDUMP, "--disassemble", "--demangle", "--no-show-raw-insn", str(program)]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()
