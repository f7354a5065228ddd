"""What the compiled library and the wheel must be: no instruction set leaks, one wheel for every torch and Python."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
        symbols = subprocess.run(["nm", target], check=True, capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if line.split()[-2] in ("W", "V", "u")]
        assert not weak, f"{source}: {weak}"


def test_isa_files_include_no_standard_library():
    """DESIGN section 5: intrinsics, <cstdint>, <cstring> and our own headers."""
    allowed = {"<cstdint>", "<cstring>", "<immintrin.h>"}
    for path in (ROOT / "csrc/cpu").iterdir():
        if path.suffix == ".h" or any(path.stem.endswith(f"_{isa}") for isa in SETUP.ISA_FLAGS):
            includes = {line.split()[1] for line in path.read_text().splitlines() if line.startswith("#include <")}
            assert includes <= allowed, f"{path.name} includes {includes - allowed}"


def test_wheel_is_one_for_every_python_and_carries_its_data(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*command, "--wheel-dir", tmp_path, ROOT], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.iterdir()
    assert "-cp310-abi3-" in wheel.name, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("_cpu.abi3.so", "demo/wordnet.jsonl", "demo/WORDNET_LICENSE", "cli/demo.py"):
        assert f"nf4kernels/{name}" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]
