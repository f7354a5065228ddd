"""The kernels for aarch64, compiled for it and run by qemu: the contract of each op at each instruction set, forced,
and what CPUs choose that have not all of them.
"""

from dataclasses import dataclass

import pytest
import torch
from arm import build, counts
from arm.machine import Machine
from contract import (
    test_combine_experts,
    test_grouped_linear,
    test_grouped_lora_grad,
    test_grouped_lora_inner,
    test_linear,
    test_linear_dgrad,
    test_lora_grad,
)
from support import cases
from support.cases import DTYPES, HALVES, Layout, dtype_id
from support.numerics import assert_product_within_bound, assert_same_bits
from support.program_cases import GROUPED, PRODUCT, case_id
from support.ways import Way

import nf4kernels
from nf4kernels import reference
from nf4kernels.codebook import INT8_CODE

MISSING = build.missing(build.CXX, build.QEMU)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

# What qemu's models of CPUs have, best first. None of them lacks NEON.
CPUS = {"max": ["neon_bf16", "neon", "scalar"], "neoverse-n1": ["neon", "scalar"], "cortex-a53": ["neon", "scalar"]}
ISAS = tuple(CPUS["max"])
LAYOUTS = (
    cases.DEFAULT,
    Layout(scale_codebook=None),
    Layout(32, "custom", "dynamic8"),
    Layout(4096, "fp4"),
    *cases.FORMATS,
)


@dataclass(frozen=True)
class ArmWay(Way):
    """An instruction set on a machine; sizes around its tiles of 5 and 6 x 16, its runs of k and its 4 rows of W."""

    def run(self, op: str, *arguments):
        return self.ops.run(op, *arguments)

    def shapes(self, op: str) -> tuple[tuple[int, int], ...]:
        return (1, 1), (5, 63), (17, 32), (33, 65), (19, 64), (35, 192), (37, 100), (10, 1088)

    def rows(self, op: str) -> tuple[int, ...]:
        return 0, 1, 2, 3, 4, 5, 6, 7, 13

    def few_rows(self, op: str) -> tuple[int, ...]:
        return 1, 4, 7


@pytest.fixture(scope="module")
def program():
    return build.build()


@pytest.fixture(scope="module")
def machine(program):
    machine = Machine(program, "max")
    yield machine
    machine.close()


@pytest.fixture(params=ISAS)
def arm(request, machine):
    with machine.running(request.param):
        yield ArmWay(f"aarch64 {request.param}", machine)


@pytest.mark.parametrize("cpu", CPUS)
def test_the_best_instruction_set_that_a_cpu_has_runs(program, cpu):
    machine = Machine(program, cpu)
    assert machine.isas == CPUS[cpu]
    assert machine.isa == CPUS[cpu][0]
    qweight, x = cases.quantized(17, 128), cases.activations(6, 128, torch.bfloat16)
    assert_product_within_bound(machine.run("linear", x, *qweight.op_args()), x, cases.dense(qweight).T, cpu)
    assert machine.force_isa("avx2") == f"must be one of {' '.join(CPUS[cpu])} on this machine, got avx2"
    machine.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_quantize(arm, dtype):
    for N, K in ((3, 5), (33, 65), (19, 192)):
        weight = cases.weight(N, K, dtype)
        weight[0, 0] = 0
        for block_size, name in ((16, "nf4"), (32, "fp4"), (64, "nf4"), (64, "custom"), (128, "int4")):
            code = Layout(codebook=name).code
            expected = reference.quantize(weight, code, block_size)
            for actual, right in zip(arm.run("quantize", weight, code, block_size), expected):
                assert_same_bits(actual, right.flatten(), f"{arm} {N}x{K} {block_size} {name}")


def test_quantize_every_rank_and_tie(arm):
    """Midpoints and their neighbours, in codebooks with and without a bucket for each level; a block that holds NaN."""
    close = torch.tensor([-1, -0.99, -0.98, -0.97, -0.9, -0.8, -0.7, -0.6, 0, 0.1, 0.11, 0.12, 0.13, 0.14, 0.9, 1])
    for code in (Layout().code, cases.CUSTOM_CODE, close):
        middles = (code[:-1] + code[1:]) / 2
        near = [middles.nextafter(middles - 1), middles, middles.nextafter(middles + 1), code, torch.ones(3)]
        weight = torch.cat(near).view(1, 64).repeat(4, 1)
        weight[1] *= 3e38
        weight[2, 5] = torch.nan
        weight[3] = 0
        for actual, right in zip(arm.run("quantize", weight, code, 64), reference.quantize(weight, code, 64)):
            assert_same_bits(actual, right.flatten(), f"{arm} {code}")


@pytest.mark.parametrize("name", ["e4m3", "dynamic8"])
def test_quantize_absmax(arm, name):
    absmax, scale_code = torch.rand(700), cases.scale_code_of(Layout(scale_codebook=name))
    expected = reference.quantize_absmax(absmax, scale_code, name == "e4m3")
    for actual, right in zip(arm.run("quantize_absmax", absmax, scale_code, name == "e4m3"), expected):
        assert_same_bits(actual, right, f"{arm} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dequantize(arm, dtype):
    for layout in LAYOUTS:
        for N, K in ((33, 65), (5, 192)):
            qweight = cases.random_bytes(N, K, layout)
            for rows, columns in (((0, N), (0, K)), ((2, N - 1), (3, K - 6))):
                arguments = (*qweight.op_args(), *rows, *columns, dtype)
                expected = reference.dequantize(*arguments)
                assert_same_bits(arm.run("dequantize", *arguments), expected, f"{arm} {layout} {N}x{K} {columns}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_int8(arm, dtype):
    for shape, block_size in (((33, 65), 64), ((19, 192), 64), ((7, 48), 16), ((5, 320), 4096)):
        w, code = cases.weight(*shape, dtype), INT8_CODE
        w[0, 0] = torch.nan if shape == (33, 65) else 0
        for actual, right in zip(arm.run("quantize", w, code, block_size), reference.quantize(w, code, block_size)):
            assert_same_bits(actual, right.flatten(), f"{arm} {shape} {block_size}")
        qweight = nf4kernels.quantize(w.nan_to_num(), "int8", block_size)
        arguments = (*qweight.op_args(), 1, shape[0], 3, shape[1] - 2, dtype)
        assert_same_bits(arm.run("dequantize", *arguments), reference.dequantize(*arguments), f"{arm} {shape}")
        matrix = cases.dense(qweight)
        for M in (1, 3, 4, 5, 13):
            x, dy = cases.activations(M, shape[1], dtype), cases.activations(M, shape[0], dtype)
            lora = cases.activations(M, 3, dtype, seed=2), cases.activations(shape[0], 3, dtype, seed=3)
            y = arm.run("linear", x, *qweight.op_args(), None, *lora, 1.5)
            joined = torch.cat([x, lora[0]], 1), torch.cat([matrix.T, 1.5 * lora[1].float().T], 0)
            assert_product_within_bound(y, *joined, f"{arm} linear {shape} M={M}")
            assert_product_within_bound(arm.run("linear_dgrad", dy, *qweight.op_args()), dy, matrix, f"{arm} {M}")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_dequantize_rounds_every_number_as_the_reference(arm, dtype):
    """Ties, subnormal numbers of the dtype, what overflows it, infinities and NaN."""
    numbers = torch.tensor([0x3F808000, 0x3F818000, 0x3F800FFF, 0x3F801000, 0x00018000, 0x00008000, 0x33000000,
                            0x33000001, 0x387FFFFF, 0x477FF000, 0x477FEFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000,
                            0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)  # fmt: skip
    qweight = cases.random_bytes(4, 64, Layout(64, "nf4", None))
    absmax = torch.tensor([1.0, -1.0, 1.0, 0.5]).view(4, 1)
    qweight = cases.with_tensors(qweight, code=numbers, absmax=absmax, codebook="custom")
    arguments = (*qweight.op_args(), 0, 4, 0, 64, dtype)
    assert_same_bits(arm.run("dequantize", *arguments), reference.dequantize(*arguments), f"{arm}")


def by_isas(cases):
    """Each case at the NEON levels, and every fourth at the portable one, whose code other machines run as well."""
    every = [(isa, case) for isa in ISAS for case in (cases if isa != "scalar" else cases[::4])]
    ids = [f"{isa}-{case_id(case)}" for isa, case in every]
    return pytest.mark.parametrize(("arm", "case"), every, indirect=["arm"], ids=ids)


@by_isas(PRODUCT)
@pytest.mark.parametrize("contract", [test_linear.TestLinear, test_linear_dgrad.TestLinearDgrad])
def test_product(arm, contract, case):
    getattr(contract(), case[0])(arm, *case[1:])


@by_isas(GROUPED)
@pytest.mark.parametrize(
    "contract", [test_grouped_linear.TestGroupedLinear, test_grouped_linear.TestGroupedLinearDgrad]
)
def test_grouped_product(arm, contract, case):
    getattr(contract(), case[0])(arm, *case[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_lora(arm, dtype):
    for mean in (0.0, 1.0):
        test_lora_grad.test_every_shape(arm, dtype, mean)
    test_lora_grad.test_is_rounded_once_to_the_dtype_asked_for(arm, dtype)
    test_grouped_lora_inner.test_a_long_depth_with_a_mean(arm, dtype)
    for rows in ((0, 3, 0, 17, 5, 0), (9,)):
        test_grouped_lora_inner.test_every_shape(arm, rows, dtype)
        test_grouped_lora_grad.test_every_shape(arm, rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_routing(arm, dtype):
    for test in (test_combine_experts.test_combine, test_combine_experts.test_dgrad, test_combine_experts.test_wgrad):
        test(arm, dtype)


def test_isa_files_export_no_weak_symbol(program):
    """As test_build.py says of x86: it could be the copy with bf16 instructions in it that the program keeps."""
    for source in build.ISA_SOURCES:
        weak = [line for line in build.symbols(build.FOLDER / f"{source.rpartition('/')[2]}.o") if " W " in line]
        assert not weak, f"{source}: {weak}"


def test_the_sums_of_products_stay_in_registers(program):
    """No store beside them: gcc spills some as soon as it loads too much of B ahead."""
    for row in (row for row in counts.ROWS if "products" in row.what):
        stores = [each for each in row.loop().instructions if each[0].startswith("st")]
        assert not stores, (row.what, stores)


@pytest.mark.slow
def test_the_library_builds_with_its_bindings():
    """What it does not define itself is torch's and the system's."""
    symbols = build.symbols(build.build_library(), "--dynamic", "--undefined-only")
    assert any("aoti_torch_" in line for line in symbols)
    assert not [line for line in symbols if "nf4::" in line]
    defined = build.symbols(build.FOLDER / "_cpu.so", "--dynamic", "--defined-only")
    assert any(line.endswith(" T nf4kernels_force_cpu_isa") for line in defined)
