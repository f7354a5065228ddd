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
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", check=False)


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
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=True
    )
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


@pytest.mark.parametrize("name", native.CPU_PRODUCTS)
def test_environment_forces_products(native_library, name):
    result = run_python(INFO, NF4KERNELS_CPU_PRODUCTS=name)
    assert result.returncode == 0, result.stderr
    assert f"products of bf16, fp16, any rows: {name} (forced)" in result.stdout


@pytest.mark.parametrize("name", ["gemm", "", "Fused"])
def test_environment_refuses_unknown_products(native_library, name):
    result = run_python(INFO, NF4KERNELS_CPU_PRODUCTS=name)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.endswith(f"NF4KERNELS_CPU_PRODUCTS must be one of fused dequantize_gemm, got {name}".strip())


def test_running_products_runs_them_alone_and_puts_everything_back(native_library):
    """On each instruction set, though the contracts force them on the best one."""
    qweight, before = cases.quantized(40, 128), str(nf4kernels.backend_info())
    ran = {name: set() for name in native.CPU_PRODUCTS}
    for level in native_library.isas:
        for name in ran:
            with native_library.running_isa(level), native_library.running_products(name):
                native_library.products_that_ran()
                nf4kernels.linear(cases.activations(3, 128, torch.bfloat16), qweight)
                ran[name] |= native_library.products_that_ran()
    assert ran["dequantize_gemm"] == {"dequantize_gemm"}
    assert "dequantize_gemm" not in ran["fused"]
    with pytest.raises(ValueError, match="fused dequantize_gemm"):
        native_library.force_products("gemm")
    assert str(nf4kernels.backend_info()) == before


@pytest.mark.parametrize(
    ("amx", "lines"),
    [
        (0, ["bf16, fp16, any rows: fused (this CPU has no AMX)"]),
        (
            native.AMX_BF16,
            [
                "bf16, up to 31 rows: fused (few rows)",
                "bf16, more rows: dequantize_gemm (torch's GEMM has AMX: predicted to be faster from M = 32 on)",
                "fp16, any rows: fused (this CPU has AMX for bf16 alone)",
            ],
        ),
    ],
)
def test_backend_info_tells_where_products_go_through_torch(native_library, monkeypatch, amx, lines):
    monkeypatch.setattr(native_library, "amx", amx)
    monkeypatch.setattr(
        native_library, "why_no_amx", "this CPU has AMX for bf16 alone" if amx else "this CPU has no AMX"
    )
    if native_library.isas[0] == native.TILES_ISA:
        fp16 = f"fp16, any rows: fused ({native_library.why_no_amx})"
        lines = ["bf16, any rows: fused (on AMX tiles from 4 rows on)", fp16]
    with native_library.running_isa(native_library.isas[0]), native_library.running_products(""):
        assert nf4kernels.backend_info().kernels["cpu"] == [f"products of {line}" for line in lines]
    with native_library.running_isa("scalar"), native_library.running_products(""):
        (line,) = nf4kernels.backend_info().kernels["cpu"]
        assert len(native_library.isas) == 1 or line.endswith("any rows: fused (scalar is forced, which has no AMX)")


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
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "loaded\n", "")


def test_import_does_not_initialise_cuda():
    """A process that forks after the import could not use CUDA in its children."""
    result = run_python("import nf4kernels, torch; assert not torch.cuda.is_initialized()")
    assert result.returncode == 0, result.stderr


@pytest.fixture
def library_of(cuda_library, monkeypatch):
    """The library as if it had been built for these architectures with CUDA 13.0, beside a driver of this version."""
    monkeypatch.setattr(cuda_library, "version", 13000)

    def library(architectures=ARCHITECTURES, driver=13000):
        monkeypatch.setattr(cuda_library, "architectures", architectures)
        monkeypatch.setattr(cuda_library, "_driver_version", lambda: driver)
        return cuda_library

    return library


HAS = "and the library has code for 80 86 89 90a 100 120+PTX"


@pytest.mark.parametrize(
    ("capability", "code", "why"),
    [
        ((7, 5), None, "this device is sm_75, and the kernels need sm_80"),
        ((8, 0), "sm_80", ""),
        ((8, 6), "sm_86", ""),
        ((8, 7), None, f"this device is sm_87, {HAS}"),  # Orin
        ((8, 9), "sm_89", ""),
        ((9, 0), "sm_90a", ""),
        ((10, 0), "sm_100", ""),
        ((10, 1), None, f"this device is sm_101, {HAS}"),  # Thor's name before CUDA 13
        ((10, 3), "sm_100", "sm_103 runs sm_100's code"),  # B300
        ((11, 0), None, f"this device is sm_110, {HAS}"),  # Thor
        ((12, 0), "sm_120", ""),
        ((12, 1), "sm_120", "sm_121 runs sm_120's code"),  # GB10
        ((13, 0), "sm_120 by PTX", "the driver compiles it for sm_130 when it is first needed"),
    ],
)
def test_code_for_a_device(library_of, capability, code, why):
    assert library_of().code_for(capability) == (code, why)


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        ((9, 1), "90a", None),
        ((9, 0), "90 90a", "sm_90a"),
        ((9, 0), "80+PTX", "sm_80 by PTX"),
        ((9, 0), "80+PTX 86+PTX 100+PTX", "sm_86 by PTX"),
        ((9, 0), "80 90a+PTX", "sm_90a"),
        ((10, 0), "80 90a+PTX", None),  # PTX with a letter is for one device
        ((10, 3), "100f", "sm_100f"),
        ((10, 0), "103f", None),
        ((12, 1), "120f 121a", "sm_121a"),
        ((8, 7), "80+PTX 86", "sm_80 by PTX"),
        ((8, 7), "80+PTX 86 87", "sm_87"),
        ((8, 9), "87", None),  # nor does a card run what is for a GPU beside the CPU
        ((11, 0), "89+PTX 100", "sm_89 by PTX"),
        ((11, 0), "100 110", "sm_110"),
        ((8, 7), "87+PTX", "sm_87"),
        ((8, 0), "87+PTX", None),
    ],
)
def test_code_for_a_device_by_what_the_library_has(library_of, capability, architectures, code):
    assert library_of(architectures.split()).code_for(capability)[0] == code


@pytest.mark.parametrize(
    ("capability", "driver", "code", "why"),
    [
        ((9, 0), 12080, None, "the library was built with CUDA 13.0, the driver is for CUDA 12.8"),
        ((9, 0), 13000, "sm_90a", ""),
        ((13, 0), 13020, "sm_120 by PTX", "the driver compiles it for sm_130 when it is first needed"),
    ],
)
def test_code_for_a_driver(library_of, capability, driver, code, why):
    assert library_of(driver=driver).code_for(capability) == (code, why)


def test_ptx_newer_than_the_driver_is_not_compiled_by_it(library_of, monkeypatch):
    library = library_of(driver=13000)
    monkeypatch.setattr(library, "version", 13010)
    assert library.code_for((12, 0)) == ("sm_120", "")  # machine code of the same major version runs
    why = "sm_130 needs the library's PTX, of CUDA 13.1, and the driver compiles CUDA 13.0's"
    assert library.code_for((13, 0)) == (None, why)


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


def test_an_exhausted_memory_is_told_in_torchs_words(native_library):
    """Programs that try smaller batches know it by them, of which a torch before 2.13 hands out none."""
    qweight = nf4kernels.quantize(torch.randn(2**20, 1))
    words = r"can't allocate memory.*\[4194304, 1048576\] of Float"
    with pytest.raises(RuntimeError, match=rf"(?s)nf4kernels\.new_empty: .*{words}"):
        nf4kernels.linear(torch.zeros(2**22, 1), qweight)
    with pytest.raises(RuntimeError, match=r"(?s)nf4kernels\.new_empty: .*\[274877906944, 64\] of Float"):
        nf4kernels.linear(torch.zeros(1, 64).expand(2**38, 64), nf4kernels.quantize(torch.randn(4, 64)))
