"""What the compiled libraries and the wheel must be: no instruction set leaks, one wheel for every torch and Python,
CUDA whenever there is an nvcc."""

import importlib.util
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from setuptools import Extension
from setuptools.errors import CompileError
from support.paths import ROOT

SPEC = importlib.util.spec_from_file_location("nf4kernels_setup", ROOT / "setup.py")
SETUP = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SETUP)


@pytest.mark.parametrize("isa", SETUP.ISA_FLAGS)
def test_isa_files_export_no_weak_symbol(isa, tmp_path):
    """The linker keeps one copy of a weak symbol for the whole program: it could be the one with AVX-512 in it."""
    for source in SETUP.sources_of(isa):
        target = tmp_path / "kernel.o"
        flags = [*SETUP.FLAGS, *SETUP.ISA_FLAGS[isa]]
        subprocess.run(["c++", *flags, "-O1", "-c", ROOT / source, "-o", target], check=True)
        symbols = subprocess.run(["nm", target], check=True, capture_output=True, encoding="utf-8").stdout
        weak = [line for line in symbols.splitlines() if line.split()[-2] in ("W", "V", "u")]
        assert not weak, f"{source}: {weak}"


def test_isa_files_include_no_standard_library():
    """docs/design.md, section 5: intrinsics, <cstdint>, <cstring> and our own headers."""
    allowed = {"<cstdint>", "<cstring>", "<immintrin.h>", "<arm_neon.h>"}
    for path in (ROOT / "csrc/cpu").iterdir():
        if path.suffix == ".h" or any(path.stem.endswith(f"_{isa}") for isa in SETUP.ISA_FLAGS):
            includes = {
                line.split()[1]
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.startswith("#include <")
            }
            assert includes <= allowed, f"{path.name} includes {includes - allowed}"


def test_wheel_is_one_for_every_python_and_carries_its_data(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*command, "--wheel-dir", tmp_path, ROOT], capture_output=True, encoding="utf-8")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.iterdir()
    assert "-cp310-abi3-" in wheel.name, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert ("nf4kernels/_cuda.abi3.so" in names) == (SETUP.find_nvcc() is not None)
    data = [f"backends/tuned/{path.name}" for path in (ROOT / "nf4kernels/backends/tuned").iterdir()]
    data += ["demo/wordnet.jsonl", "demo/plain.jinja", "demo/WORDNET_LICENSE"]
    for name in ("_cpu.abi3.so", "cli/demo.py", "backends/triton/linear.py", *data):
        assert f"nf4kernels/{name}" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]


CUDA_LIBRARY = ROOT / "nf4kernels/_cuda.abi3.so"
# An nvcc that knows three architectures, writes what it is asked to, and keeps a record of its commands.
FAKE_NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_75 compute_80 compute_90; exit; fi
echo "$@" >> "$0.log"
while [ $# -gt 0 ]; do
  case "$1" in
    -c) source="$2";;
    -MF) makefile="$2";;
    -o) echo > "$2"; if [ -n "$makefile" ]; then echo "$2 : $source" > "$makefile"; fi;;
  esac
  shift
done
"""
# The machine's own compiler, with the same record.
LOGGED_CXX = """#!/bin/sh
echo "$@" >> "$0.log"
exec c++ "$@"
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """The path of the fake; what it was called with is beside it."""
    monkeypatch.setattr(SETUP, "BUILD", tmp_path / "build")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.chdir(ROOT)
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(FAKE_NVCC, encoding="utf-8")
    path.chmod(0o755)
    return path


def build_with(nvcc: Path) -> list[str]:
    """What nvcc was called with to build the library."""
    log = Path(f"{nvcc}.log")
    log.write_text("", encoding="utf-8")
    torch = {"include_dirs": ["torch/include"], "library_dirs": ["torch/lib"], "libraries": ["torch_cpu"]}
    SETUP.build_cuda(str(nvcc), Extension("nf4kernels._cuda", [], **torch))
    return log.read_text(encoding="utf-8").splitlines()


def test_the_cuda_library_needs_no_cuda_library_and_shows_no_name_of_the_runtime():
    if not CUDA_LIBRARY.exists():
        pytest.skip("nf4kernels/_cuda.abi3.so was not built: no nvcc?")
    needed = subprocess.run(["readelf", "-d", CUDA_LIBRARY], check=True, capture_output=True, encoding="utf-8").stdout
    needed = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if "cud" in name], needed
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", CUDA_LIBRARY], check=True, capture_output=True, encoding="utf-8"
    )
    functions = [line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-2] == "T"]
    assert functions
    assert all(name.startswith("nf4kernels_cuda_") for name in functions), functions


def test_nvcc_compiles_every_kernel_file_for_every_architecture(nvcc, monkeypatch):
    commands = build_with(nvcc)
    for source in SETUP.CUDA_SOURCES:
        (command,) = [c for c in commands if f"-c {source} " in c]
        for flag in ("-fmad=false", "arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"):
            assert flag in command
        assert "arch=compute_80,code=compute_80" in command, "the newest without a letter: 90a's PTX is for 9.0 alone"
        assert "120" not in command, "this nvcc does not know it"
    (binding,) = [c for c in commands if "-c csrc/bindings/cuda.cpp " in c]
    assert "-gencode" not in binding
    assert '-DNF4_CUDA_ARCHITECTURES="80+PTX 90a"' in binding
    assert commands[-1].startswith("-shared -cudart static")
    assert len(commands) == len(SETUP.CUDA_SOURCES) + len(SETUP.CUDA_BINDINGS) + 2  # and rounded_code and the link


def test_only_what_changed_is_compiled_again(nvcc, monkeypatch):
    build_with(nvcc)
    assert build_with(nvcc) == []
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert len(build_with(nvcc)) == len(SETUP.CUDA_SOURCES) + len(SETUP.CUDA_BINDINGS) + 2
    os.utime(SETUP.BUILD / "cuda" / "cuda.cpp.o", (0, 0))
    compiled, linked = build_with(nvcc)
    assert "-c csrc/bindings/cuda.cpp " in compiled
    assert linked.startswith("-shared")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """compile(*flags): what the machine's compiler was asked to compile in a tree of two sources and three headers."""
    monkeypatch.setattr(SETUP, "ROOT", tmp_path)
    compiler = tmp_path / "c++"
    compiler.write_text(LOGGED_CXX, encoding="utf-8")
    compiler.chmod(0o755)
    (tmp_path / "both.h").write_text("#pragma once\n", encoding="utf-8")
    (tmp_path / "first.h").write_text('#include "inside first.h"\n#include "both.h"\n', encoding="utf-8")
    (tmp_path / "inside first.h").write_text("#include <cstdint>\n", encoding="utf-8")
    (tmp_path / "first.cpp").write_text('#include "first.h"\n', encoding="utf-8")
    (tmp_path / "second.cpp").write_text('#include "both.h"\n', encoding="utf-8")
    log = Path(f"{compiler}.log")

    def compile(*flags):
        log.write_text("", encoding="utf-8")
        commands = {source: [str(compiler), *flags] for source in ("first.cpp", "second.cpp")}
        SETUP.compile_changed(commands, tmp_path / "objects")
        return sorted(re.findall(r"-c (\S+)", log.read_text(encoding="utf-8")))

    compile.root = tmp_path
    return compile


def test_a_header_s_edit_compiles_only_what_includes_it(tree):
    assert tree() == ["first.cpp", "second.cpp"]
    assert tree() == []
    edits = {"first.h": ["first.cpp"], "inside first.h": ["first.cpp"], "both.h": ["first.cpp", "second.cpp"]}
    for header, including in edits.items():
        time.sleep(0.05)  # longer than a tick of the file system's clock
        (tree.root / header).touch()
        assert tree() == including, header
        assert tree() == []


def test_other_flags_or_a_header_that_went_compile_again(tree):
    tree()
    assert tree("-O1") == ["first.cpp", "second.cpp"]
    (tree.root / "first.cpp").write_text("", encoding="utf-8")
    (tree.root / "inside first.h").unlink()
    assert tree("-O1") == ["first.cpp"]
    assert tree("-O1") == []


def test_an_object_depends_on_the_system_s_headers_too(tree):
    """torch's may be replaced where they stand."""
    tree()
    included = SETUP.included_files(tree.root / "objects" / "first.cpp.d")
    assert {"first.cpp", "first.h", "inside first.h", "both.h"} <= set(included)
    assert any(Path(path).name == "cstdint" for path in included)


@pytest.mark.parametrize(
    ("cpu", "known", "architectures"),
    [
        ("x86_64", "75 80 86 87 88 89 90 100 103 110 120 121", "80 86 89 90a 100 120+PTX"),  # CUDA 13.0
        ("aarch64", "75 80 86 87 88 89 90 100 103 110 120 121", "80 86 87 89 90a 100 110 120+PTX"),
        ("aarch64", "50 60 70 80 86 87 89 90", "80 86 87 89+PTX 90a"),  # CUDA 12.4
        ("x86_64", "50 60 70 80 86 87 89 90 100 101 120", "80 86 89 90a 100 120+PTX"),  # CUDA 12.8
    ],
)
def test_architectures_by_default(nvcc, monkeypatch, cpu, known, architectures):
    listed = " ".join(f"compute_{number}" for number in known.split())
    nvcc.write_text(FAKE_NVCC.replace("compute_75 compute_80 compute_90", listed), encoding="utf-8")
    monkeypatch.setattr("platform.machine", lambda: cpu)
    spec = importlib.util.spec_from_file_location("nf4kernels_setup_elsewhere", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    assert setup.cuda_architectures(str(nvcc)) == architectures.split()


def test_an_nvcc_too_old_is_an_error(nvcc):
    nvcc.write_text(FAKE_NVCC.replace("compute_80", "compute_61").replace("compute_90", "compute_70"), encoding="utf-8")
    with pytest.raises(SystemExit, match="need an nvcc that knows sm_80"):
        SETUP.cuda_architectures(str(nvcc))


@pytest.mark.parametrize(
    ("asked", "architectures"),
    [
        ("8.0", ["80"]),
        ("8.0;9.0a+PTX", ["80", "90a+PTX"]),
        ("7.5 8.6 12.0+PTX", ["86", "120+PTX"]),
        ("10.0f", ["100f"]),
    ],
)
def test_architectures_asked_for(nvcc, monkeypatch, asked, architectures):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert SETUP.cuda_architectures(str(nvcc)) == architectures


@pytest.mark.parametrize(("asked", "message"), [("Hopper", 'like "8.0;9.0a.PTX", got Hopper'), ("7.5", "8.0 or newer")])
def test_architectures_refused(nvcc, monkeypatch, asked, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match=message):
        SETUP.cuda_architectures(str(nvcc))


def test_a_failing_nvcc_is_an_error(nvcc):
    nvcc.write_text(FAKE_NVCC + "exit 1", encoding="utf-8")
    with pytest.raises(CompileError, match=r"failed.*NF4KERNELS_CUDA=0"):
        build_with(nvcc)
    assert not (SETUP.BUILD / "cuda" / "_cuda.so").exists()


def test_where_nvcc_is_found(nvcc, monkeypatch):
    monkeypatch.delenv("NF4KERNELS_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    assert SETUP.find_nvcc() == str(nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert SETUP.find_nvcc() == str(nvcc)
    monkeypatch.setenv("NF4KERNELS_CUDA", "0")
    assert SETUP.find_nvcc() is None
    monkeypatch.setenv("NF4KERNELS_CUDA", "no")
    with pytest.raises(SystemExit, match=r"NF4KERNELS_CUDA must be 0 .*got no"):
        SETUP.find_nvcc()


def test_the_compiler_is_one_that_is_there(tmp_path, monkeypatch):
    """By CXX, or else the first of the usual names; a CXX that is not there is no reason to take another."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert SETUP.find_compiler() is None
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\n", encoding="utf-8")
    clang.chmod(0o755)
    assert SETUP.find_compiler() == "clang++"
    monkeypatch.setenv("CXX", "clang++ -pthread")
    assert SETUP.find_compiler() == "clang++ -pthread"
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(SystemExit, match=r"CXX must be a C\+\+ compiler that is there, got /nowhere/g\+\+"):
        SETUP.find_compiler()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_an_sdist_has_the_kernels_of_every_machine(machine, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setenv("NF4KERNELS_CUDA", "0")
    (extension,) = SETUP.build_options()["ext_modules"]
    every = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert every <= {*extension.sources, *extension.depends}


def test_the_bindings_use_macros_that_torch_2_10_has():
    """The newest torch compiles them here; an older one is only seen where somebody has it."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc/bindings").iterdir()))
    used = set(re.findall(r"\b(?:STABLE_|AOTI_)?TORCH_[A-Z_]+\b", text))
    assert used <= {"STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX", "TORCH_ABI_VERSION", "TORCH_ERROR_CODE_CHECK"}
