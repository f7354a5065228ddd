"""The kernels for aarch64, compiled for it and run by qemu: each op at each instruction set, forced, and on CPUs that
have not all of them. Bits and bounds are those of docs/design.md, section 7, as for the other instruction sets in
tests/contract; sizes are small, since qemu is a thousand times slower than the machine.
"""

import pytest
import torch
from arm import build
from arm.machine import Machine
from support import cases
from support.cases import DTYPES, HALVES, Layout, dtype_id
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased

from nf4kernels import reference

MISSING = build.missing(build.CXX, build.QEMU)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

# What qemu's models of CPUs have, and what runs there.
CPUS = {"max": ["neon_bf16", "neon", "scalar"], "neoverse-n1": ["neon", "scalar"], "cortex-a53": ["neon", "scalar"]}
LAYOUTS = (
    cases.DEFAULT,
    Layout(scale_codebook=None),
    Layout(32, "custom", "dynamic8"),
    Layout(4096, "fp4"),
    Layout(16, "nf4", "e4m3"),
    *cases.FORMATS[:5],
)
ISAS = tuple(CPUS["max"])
SCALING = 1.75


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
    """The machine with this instruction set forced."""
    with machine.running(request.param):
        yield machine


@pytest.mark.parametrize("cpu", CPUS)
def test_the_best_instruction_set_that_a_cpu_has_runs(program, cpu):
    machine = Machine(program, cpu)
    assert machine.isas == CPUS[cpu]
    assert machine.isa == CPUS[cpu][0]
    qweight, x = cases.quantized(17, 128), cases.activations(6, 128, torch.bfloat16)
    assert_product_within_bound(machine.linear(x, *qweight.op_args()), x, cases.dense(qweight).T, cpu)
    assert "must be one of" in machine.force_isa("avx2")
    machine.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_quantize(arm, dtype):
    for N, K in ((3, 5), (33, 65), (19, 192)):
        weight = cases.weight(N, K, dtype)
        weight[0, 0] = 0
        for block_size, name in ((16, "nf4"), (32, "fp4"), (64, "nf4"), (64, "custom"), (128, "int4")):
            code = Layout(codebook=name).code
            expected = reference.quantize(weight, code, block_size)
            for actual, right in zip(arm.quantize(weight, code, block_size), expected):
                assert_same_bits(actual, right.flatten(), f"{arm.isa} {N}x{K} {block_size} {name}")


def test_quantize_every_rank_and_tie(arm):
    """Midpoints and their neighbours, in codebooks with and without a bucket for each level; blocks that hold NaN."""
    close = torch.tensor([-1, -0.99, -0.98, -0.97, -0.9, -0.8, -0.7, -0.6, 0, 0.1, 0.11, 0.12, 0.13, 0.14, 0.9, 1])
    for code in (Layout().code, cases.CUSTOM_CODE, close):
        middles = (code[:-1] + code[1:]) / 2
        near = [middles.nextafter(middles - 1), middles, middles.nextafter(middles + 1), code, torch.ones(3)]
        weight = torch.cat(near).view(1, 64).repeat(4, 1)
        weight[1] *= 3e38
        weight[2, 5] = torch.nan
        weight[3] = 0
        for actual, right in zip(arm.quantize(weight, code, 64), reference.quantize(weight, code, 64)):
            assert_same_bits(actual, right.flatten(), f"{arm.isa} {code}")


def test_quantize_absmax(arm):
    absmax = torch.rand(700)
    for name in ("e4m3", "dynamic8"):
        code = Layout(scale_codebook=name)
        scale_code = cases.scale_code_of(code)
        expected = reference.quantize_absmax(absmax, scale_code, name == "e4m3")
        for actual, right in zip(arm.quantize_absmax(absmax, scale_code, name == "e4m3"), expected):
            assert_same_bits(actual, right, f"{arm.isa} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dequantize(arm, dtype):
    for layout in (*LAYOUTS, *cases.FORMATS[5:]):
        for N, K in ((33, 65), (5, 192)):
            qweight = cases.random_bytes(N, K, layout)
            for rows, columns in (((0, N), (0, K)), ((2, N - 1), (3, K - 6))):
                arguments = (*qweight.op_args(), *rows, *columns, dtype)
                expected = reference.dequantize(*arguments)
                assert_same_bits(arm.dequantize(*arguments), expected, f"{arm.isa} {layout} {N}x{K} {columns}")


class Product:
    """linear or its gradient, with their terms."""

    def __init__(self, op: str) -> None:
        self.op, self.is_linear = op, op == "linear"

    def check(self, arm, qweight, M, dtype, mean=0.0, rank=0):
        N, K = qweight.shape
        depth, columns = (K, N) if self.is_linear else (N, K)
        a = cases.activations(M, depth, dtype, mean)
        matrix = cases.dense(qweight).T if self.is_linear else cases.dense(qweight)
        bias = torch.randn(N).to(dtype) if self.is_linear and mean else None
        terms = {} if bias is None else {"bias": bias}
        what = f"{arm.isa} {self.op} {qweight.codebook} {qweight.scales} {N}x{K} M={M} mean {mean} rank {rank}"
        product = a, matrix
        if rank:
            inner, factor = cases.activations(M, rank, dtype, seed=3), cases.activations(rank, columns, dtype, seed=4)
            terms |= {"inner": inner, "factor": factor.T if self.is_linear else factor, "scaling": SCALING}
            product = torch.cat([a, inner], 1), torch.cat([matrix, SCALING * factor.float()], 0)
        actual = getattr(arm, self.op)(a, *qweight.op_args(), **terms)
        assert_product_within_bound(actual, *product, what, bias)
        return actual


@pytest.fixture(params=["linear", "linear_dgrad"])
def product(request):
    return Product(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_product_of_every_shape(arm, product, dtype):
    """Around every tile, with K that is no multiple of 64, 32, 16 or 2."""
    for N, K in ((1, 1), (5, 63), (17, 32), (33, 65), (19, 64), (35, 192), (37, 100), (10, 1088)):
        qweight = cases.quantized(N, K)
        for M in (1, 2, 3, 4, 5, 6, 13):
            product.check(arm, qweight, M, dtype, mean=float(M % 2), rank=M % 3 * 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_product_of_every_layout(arm, product, dtype):
    for layout in (*LAYOUTS, *cases.FORMATS[5:]):
        for N, K in ((19, 128), (33, 96)):
            for M in (1, 3, 7):
                product.check(arm, cases.quantized(N, K, layout), M, dtype)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "custom"])
def test_product_of_a_long_depth_and_a_mean(arm, product, codebook):
    """A level rounded the same way everywhere adds up under a mean; a running sum over the depth loses bits."""
    N, K = (32, 2048) if product.is_linear else (2048, 64)
    for dtype in DTYPES:
        for M in (2, 7):
            product.check(arm, cases.quantized(N, K, Layout(codebook=codebook)), M, dtype, mean=1.0)


def test_product_is_unbiased(arm, product):
    N, K = (64, 1024) if product.is_linear else (1024, 64)
    qweight = cases.quantized(N, K)
    matrix = cases.dense(qweight).T if product.is_linear else cases.dense(qweight)
    for dtype in HALVES:
        for M in (4, 16):
            a = cases.activations(M, matrix.shape[0], dtype, 1.0)
            actual = getattr(arm, product.op)(a, *qweight.op_args())
            assert_unbiased(actual, a, matrix, f"{arm.isa} {product.op}")


def test_product_of_uneven_scales(arm, product):
    """Scales far apart, and zeros among them."""
    for qweight in (cases.uneven(24, 256), cases.uneven(24, 256, zeros=False)):
        for M in (1, 9):
            product.check(arm, qweight, M, torch.bfloat16)


def test_a_row_depends_on_no_other(arm, product):
    """Not on NaN there, at any M of one register tile; and the same inputs give the same bits."""
    qweight = cases.quantized(37, 128)
    depth = qweight.shape[1 if product.is_linear else 0]
    for dtype in DTYPES:
        for M in (2, 3, 4, 5, 6, 7, 13):
            a = cases.activations(M, depth, dtype)
            run = getattr(arm, product.op)
            before = run(a, *qweight.op_args())
            assert_same_bits(run(a, *qweight.op_args()), before, f"{arm.isa} again")
            kept = a[M // 2].clone()
            a[:] = torch.nan
            a[M // 2] = kept
            after = run(a, *qweight.op_args())
            assert_same_bits(after[M // 2], before[M // 2], f"{arm.isa} {product.op} M={M} {dtype}")
