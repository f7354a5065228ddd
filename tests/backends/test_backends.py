"""Which implementation runs: every instruction set is tested or named as missing, and forcing one is never ignored."""

import os
import re
import subprocess
import sys

import pytest
import torch
from support import cases

import nf4kernels
from nf4kernels.backends import native

INFO = "import nf4kernels; print(nf4kernels.backend_info())"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONWARNINGS": "ignore"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("level", cases.ISAS)
def test_instruction_set_is_tested_here(native_library, level):
    if level not in native_library.isas:
        pytest.skip(f"this CPU lacks {level}: no test of it ran (it has {' '.join(native_library.isas)})")
    assert level in cases.IMPLEMENTATIONS


def test_the_library_knows_no_instruction_set_that_is_not_tested(native_library):
    assert set(native_library.isas) <= set(cases.ISAS)
    assert native_library.isas[-1] == "scalar"


def test_the_best_instruction_set_is_the_default(native_library):
    environment = {k: v for k, v in os.environ.items() if k != "NF4KERNELS_CPU_ISA"}
    code = "from nf4kernels.backends.select import CPU_LIBRARY as L; print(L.isa, *L.isas)"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, *isas = result.stdout.split()
    assert first == isas[0]


@pytest.mark.parametrize("level", [i for i in cases.IMPLEMENTATIONS if i != "reference"] or cases.ISAS)
def test_environment_forces(native_library, level):
    result = run_python(INFO, NF4KERNELS_CPU_ISA=level)
    assert result.returncode == 0, result.stderr
    assert f"native {level} (forced by NF4KERNELS_CPU_ISA)" in result.stdout


def test_environment_refuses_an_unknown_name(native_library):
    result = run_python(INFO, NF4KERNELS_CPU_ISA="avx1024")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert "NF4KERNELS_CPU_ISA" in message
    assert "avx1024" in message
    for level in native_library.isas:
        assert level in message


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "avx2 "])
def test_force_refuses_an_unknown_name_and_changes_nothing(native_library, name):
    before = native_library.isa
    with pytest.raises(ValueError, match="scalar"):
        native_library.force_isa(name)
    assert native_library.isa == before


def test_forced_levels_are_different_code(native_library):
    """Bits of a product may differ by level; at one shape at least they do, so that a level is not another's alias."""
    if "avx2" not in native_library.isas:
        pytest.skip("this CPU has the scalar level only")
    qweight = cases.quantized(256, 512)
    x = cases.activations(16, 512, torch.float32)
    results = {}
    for level in ("scalar", "avx2"):
        with native_library.running_isa(level):
            results[level] = nf4kernels.linear(x, qweight)
    assert not torch.equal(results["scalar"], results["avx2"])


def test_running_isa_puts_everything_back(native_library):
    before = str(nf4kernels.backend_info())
    with native_library.running_isa("scalar"):
        assert "native scalar (forced)" in str(nf4kernels.backend_info())
    assert str(nf4kernels.backend_info()) == before


def test_backend_info_tells_what_runs():
    info = nf4kernels.backend_info()
    text = str(info)
    assert torch.__version__ in text
    implementation, reason = info.devices["cpu"]
    assert implementation in text
    assert reason in text
    if cases.LIBRARY is None:
        assert implementation.startswith("reference")
        assert "not built" in reason
        assert info.cpu_isas == []
    else:
        assert implementation == f"native {cases.LIBRARY.isa}"
        assert info.cpu_isas == cases.LIBRARY.isas


ARCHITECTURES = ["80", "86", "89", "90a", "100", "120+PTX"]


def test_the_cuda_library_loads_beside_this_torch_without_a_warning(cuda_library):
    """Also, and here above all, beside a torch without CUDA."""
    code = (
        "import nf4kernels; from nf4kernels.backends import native;"
        " library = native.CudaLibrary(native.CUDA_LIBRARY); library.register('nf4kernels_native'); print('loaded')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "loaded\n", "")


def test_import_does_not_initialise_cuda():
    """A process that forks after the import could not use CUDA in its children."""
    result = run_python("import nf4kernels, torch; assert not torch.cuda.is_initialized()")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), None),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "sm_120 by PTX"),
    ],
)
def test_code_for_a_device(capability, code):
    assert native.code_for(capability, ARCHITECTURES) == code


def test_code_for_one_device_alone():
    assert native.code_for((9, 1), ["90a"]) is None
    assert native.code_for((9, 0), ["80+PTX"]) == "sm_80 by PTX"
    assert native.code_for((9, 0), ["90", "90a"]) == "sm_90a"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("missing", "not built .no nvcc"), ("cpu torch", "this torch has no CUDA"), ("0", "NF4KERNELS_CUDA=0")],
)
def test_why_the_cuda_library_is_not_loaded(monkeypatch, tmp_path, setting, reason):
    monkeypatch.setattr(torch.version, "cuda", None if setting == "cpu torch" else "13.0")
    library = tmp_path / "_cuda.abi3.so"
    if setting != "missing":
        library.write_bytes(b"not a library")
    monkeypatch.setattr(native, "CUDA_LIBRARY", library)
    monkeypatch.delenv("NF4KERNELS_CUDA", raising=False)
    if setting == "0":
        monkeypatch.setenv("NF4KERNELS_CUDA", "0")
    loaded, why_not = native.load_cuda()
    assert loaded is None
    assert re.search(reason, why_not)


def test_a_cuda_library_that_does_not_load_is_an_error_where_torch_has_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "_cuda.abi3.so")
    native.CUDA_LIBRARY.write_bytes(b"not a library")
    with pytest.raises(OSError, match=r"_cuda\.abi3\.so"):
        native.load_cuda()


@pytest.mark.parametrize("value", ["1", "", "off"])
def test_environment_refuses_another_value_for_cuda(value):
    result = run_python(INFO, NF4KERNELS_CUDA=value)
    assert result.returncode != 0
    assert f"NF4KERNELS_CUDA must be 0 (no CUDA kernels) or unset, got {value}" in result.stderr
