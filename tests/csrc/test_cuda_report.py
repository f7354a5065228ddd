"""The report on the machine code of the CUDA kernels, and the built library against its committed baseline."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import cuda_report
from benchmarks.gpu.cuda_report import Instruction, Kernel

KERNEL = Kernel("a_kernel<BFloat16>", "sm_90a", "13.0", 64, 1024, 0, 0, 500, 100, 32, 8, "LOP3 30 LDS 8")
# As cuobjdump prints it, without the bytes of the instructions: a loop of two products with one A fragment and two with
# another, a loop inside it that holds none, a loop after it, and the branch to itself that ends every kernel.
LISTING = """
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3nf44cuda12_GLOBAL__N_12aaI8BFloat16Li2EEvPf:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:540 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : _ZN3nf44cuda12_GLOBAL__N_12aaI8BFloat16Li2EEvPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
        /*0010*/                   STL.64 [R1], R2 ;                     /* 0x0000000000007919 */
        /*0020*/                   LDG.E.NA.LTC128B.128.CONSTANT R4, desc[UR6][R4.64] ;
        /*0030*/                   LDS R16, [R16+UR4] ;
        /*0040*/                   LDS.U16 R17, [R17+UR4] ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R16.reuse, R20, R8 ;
        /*0060*/                   HMMA.16816.F32.BF16 R32, R16, R12, R32 ;
        /*0070*/                   LDS.128 R16, [R24+UR4] ;
        /*0080*/                   IADD3 R40, R40, 0x1, RZ ;
        /*0090*/              @P1  BRA 0x80 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R8, R16, R20, R8 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R32, R16, R12, R32 ;
        /*00c0*/              @!P0 BRA 0x30 ;
        /*00d0*/                   FADD R1, R1, R2 ;
        /*00e0*/                   LDL R2, [R1] ;
        /*00f0*/                   BRA.U UP1, 0xd0 ;
        /*0100*/                   EXIT ;
        /*0110*/                   BRA 0x110;
        /*0120*/                   NOP ;
"""
SOURCE = """
template <int kCount>
__global__ void __launch_bounds__(1024) keeps_kernel(float* y, const float* x, int n) {
  float a[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) a[k] = x[k * n + threadIdx.x];
  for (int s = 0; s < n; ++s) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) a[k] = a[k] * x[s] + a[(k + 7) % kCount];
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) y[k * n + threadIdx.x] = a[k];
}
template __global__ void keeps_kernel<96>(float*, const float*, int);
template __global__ void keeps_kernel<8>(float*, const float*, int);
"""


@pytest.fixture(scope="module")
def tools() -> None:
    for name, package in (("cuobjdump", "nvidia-cuda-cuobjdump"), ("nvdisasm", "nvidia-cuda-nvdisasm")):
        try:
            cuda_report.tool(name, package)
        except cuda_report.MissingToolError as error:
            pytest.skip(str(error))
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is missing: kernels would have no readable names")


@pytest.fixture(scope="module")
def built(tools) -> list[Kernel]:
    """The kernels of the built library."""
    if not cuda_report.LIBRARY.exists():
        pytest.skip(f"{cuda_report.LIBRARY.name} was not built (no nvcc at install time?)")
    return cuda_report.kernels_in_library()


@pytest.mark.exhaustive
@pytest.mark.slow  # the disassembler takes two minutes for six architectures
def test_no_kernel_of_the_library_uses_local_memory(built):
    assert built, "the library has no kernels"
    assert cuda_report.faults(built) == []


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_library_is_as_the_baseline(built):
    baseline = cuda_report.read_csv()
    by, of = {kernel.nvcc for kernel in built}, {kernel.nvcc for kernel in baseline}
    if by != of:
        pytest.skip(f"compiled by nvcc {by}, the baseline is of {of}: only the use of local memory was checked")
    changed = "\n".join(cuda_report.changes(built, baseline))
    assert not changed, f"{changed}\nIf this is meant: {cuda_report.RENEW}"


def test_a_listing_is_read(monkeypatch):
    monkeypatch.setattr(cuda_report, "readable", lambda symbols: ["linear_aa_kernel<BFloat16, 2>" for _ in symbols])
    (kernel,) = cuda_report.parse(LISTING, "13.0")
    assert kernel.arch == "sm_90a"
    assert (kernel.registers, kernel.shared, kernel.stack, kernel.spills) == (40, 1024, 16, 2)
    assert kernel.instructions == 18
    assert kernel.loop == 8, "from 0x30 to 0xc0, without the loop at 0x80"
    assert kernel.loop_counts == {"HMMA": 4, "LDS": 3, "BRA": 1}
    assert kernel.shared_words == 6
    assert kernel.weights == 16, "two fragments of 8 weights a lane"
    assert kernel.per_weight == 0.5


def test_fragments_are_told_apart_by_what_is_written_between():
    def count(*code: str) -> int:
        loop = [Instruction(i, *line.split(" ", 1)) for i, line in enumerate(code)]
        return cuda_report.distinct_fragments(loop)

    product = "HMMA.16816.F32 R8, R16, R20, R8"
    assert count(product, product) == 1
    assert count(product, "IADD3 R15, R1, R2, RZ", product) == 1
    assert count(product, "IADD3 R19, R1, R2, RZ", product) == 2
    assert count(product, "LDS.128 R13, [R1]", product) == 2
    assert count(product, "LDS.64 R13, [R1]", product) == 1
    assert count(product, "STS [R16], R17", product) == 1, "a store writes no register"
    assert count(product, "HMMA.16816.F32 R8, R24, R20, R8") == 2


def test_of_several_loops_the_smallest_with_the_most_telling_instructions_is_the_main_one():
    def main_loop(text: str) -> list[int]:
        return [i.address for i in cuda_report.main_loop(cuda_report.instructions_in(text))]

    outer = "/*0000*/ MOV R1, R2 ;\n/*0010*/ LDG.E.NA R1, [R2] ;\n/*0020*/ BRA 0x10 ;\n/*0030*/ BRA 0x0 ;\n"
    assert main_loop(outer) == [0x10, 0x20]
    longer = (
        outer + "/*0040*/ MOV R1, R2 ;\n/*0050*/ MOV R1, R2 ;\n/*0060*/ MOV R1, R2 ;\n/*0070*/ IADD3 R1, R2, R3, R4 ;\n"
    )
    longer += "/*0080*/ BRA 0x40 ;\n"
    assert main_loop(longer) == [0x10, 0x20]
    assert main_loop(longer.replace(".NA", "")) == [0x40, 0x50, 0x60, 0x70, 0x80]
    assert main_loop("/*0000*/ MOV R1, R2 ;\n/*0010*/ EXIT ;\n/*0020*/ BRA 0x20;") == []


def test_names_are_readable(tools):
    symbols = ["_ZN3nf44cuda12_GLOBAL__N_16kernelINS_8BFloat16ELi2ELb1EEEvPKfi", "_Z5plainPf"]
    assert cuda_report.readable(symbols) == ["kernel<BFloat16, 2, true>", "plain"]


def test_what_the_baseline_allows():
    fewer, more = replace(KERNEL, registers=60), replace(KERNEL, registers=65)
    elsewhere = replace(KERNEL, arch="sm_80")
    assert cuda_report.changes([KERNEL], [KERNEL]) == []
    assert cuda_report.changes([fewer], [KERNEL]) == []
    assert cuda_report.changes([more], [KERNEL]) == ["a_kernel<BFloat16> on sm_90a: 65 registers, 64 in the baseline"]
    assert cuda_report.changes([KERNEL, elsewhere], [KERNEL]) == ["a_kernel<BFloat16> on sm_80 is not in the baseline"]
    other = replace(KERNEL, kernel="other")
    assert cuda_report.changes([KERNEL], [KERNEL, other]) == [
        "other on sm_90a is in the baseline and not in the library"
    ]
    assert cuda_report.changes([KERNEL], [KERNEL, elsewhere]) == [], "a library of fewer architectures"


def test_a_baseline_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "golden" / "report.csv"
    cuda_report.write_csv(path, [KERNEL, replace(KERNEL, arch="sm_80", weights=0)])
    assert cuda_report.read_csv(path) == [KERNEL, replace(KERNEL, arch="sm_80", weights=0)]


def test_the_committed_baseline_is_of_one_nvcc_and_free_of_local_memory():
    baseline = cuda_report.read_csv()
    assert {kernel.nvcc for kernel in baseline} == {"13.0"}
    assert {kernel.arch for kernel in baseline} == {f"sm_{arch}" for arch in cuda_report.ARCHITECTURES}
    assert cuda_report.faults(baseline) == []


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "")
    with pytest.raises(
        cuda_report.MissingToolError, match="no-such-tool is missing: looked for it in PyPI's nothing, PATH"
    ):
        cuda_report.tool("no-such-tool", "nothing")


def test_a_kernel_that_spills_is_found(tools, tmp_path: Path):
    """The report can fail: one of two kernels cannot hold its values in 64 registers."""
    try:
        nvcc = cuda_report.tool("nvcc")
    except cuda_report.MissingToolError as error:
        pytest.skip(str(error))
    source, cubin = tmp_path / "keeps.cu", tmp_path / "keeps.cubin"
    source.write_text(SOURCE, encoding="utf-8")
    cuda_report.output(nvcc, "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-o", str(cubin), str(source))
    found = {kernel.kernel: kernel for kernel in cuda_report.kernels_of([cubin])}
    few, many = found["keeps_kernel<8>"], found["keeps_kernel<96>"]
    assert many.spills > 0
    assert many.stack > 0
    (fault,) = cuda_report.faults([few, many])
    assert fault.startswith("keeps_kernel<96> on sm_90a: ")
    assert few.loop > 0
    assert f"release {few.nvcc}," in cuda_report.output(nvcc, "--version")
