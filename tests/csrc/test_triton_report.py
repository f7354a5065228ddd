"""The report on the machine code of Triton's kernels."""

import pytest

from benchmarks.gpu import triton_report
from benchmarks.gpu.cuda_report import Instruction, MissingToolError

# As cuobjdump prints it, without the bytes of the instructions: HGMMAs of a warpgroup for 16 rows of x, a load before.
LISTING = """
Resource usage:
 Common:
  GLOBAL:0
 Function linear_kernel:
  REG:128 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:660 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : linear_kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDG.E R2, desc[UR6][R4.64] ;
        /*0010*/                   LDS.128 R16, [R16+UR4] ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, R16, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, R20, gdesc[UR8], R24, gsb0 ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/                   EXIT ;
"""


def test_reading():
    kernel = triton_report.parse(LISTING, "linear, M <= 16", 16)
    assert (kernel.kernel, kernel.arch, kernel.registers, kernel.shared) == ("linear, M <= 16", "sm_90a", 128, 1024)
    assert (kernel.stack, kernel.spills, kernel.instructions, kernel.loop) == (0, 0, 6, 4)
    assert kernel.weights == 2 * 64 * 16 // 128  # of two products a warpgroup
    assert (kernel.shared_words, kernel.loop_counts) == (4, {"LDS": 1, "HGMMA": 2, "BRA": 1})


@pytest.mark.parametrize(
    ("opcode", "count"),
    [("HMMA.16816.F32.BF16", 2048), ("HMMA.1688.F32", 1024), ("HGMMA.64x128x16.F32", 32768), ("LDS.128", 0)],
)
def test_multiplications_of_a_warp(opcode, count):
    assert triton_report.multiplications(Instruction(0, opcode, "")) == count


@pytest.mark.exhaustive
@pytest.mark.slow  # half a minute of compilers
@pytest.mark.parametrize(("arch", "few_rows"), [("80", 8.6), ("90", 7.9)])
def test_instructions_of_the_products(arch, few_rows):
    """By Triton 3.9.0; the margin is for other versions' choices of addresses."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled")
    try:
        kernels = {kernel.kernel: kernel for kernel in triton_report.kernels_compiled(arch)}
    except MissingToolError as error:
        pytest.skip(str(error))
    assert not triton_report.faults(kernels.values())
    assert {name.partition(",")[0] for name in kernels} == {
        "linear", "linear_dgrad", "grouped_linear", "grouped_linear_dgrad",
    }  # fmt: skip
    assert all(kernel.weights for kernel in kernels.values())
    assert kernels["linear, M <= 4"].weights == 64  # of 64 rows by 128 columns in 128 threads
    assert kernels["linear, M <= 4"].per_weight < few_rows * 1.03
    assert kernels["linear_dgrad, M <= 16"].per_weight < 13.5 * 1.03
