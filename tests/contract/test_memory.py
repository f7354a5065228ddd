"""What the native kernels touch: nothing outside their tensors, no dense weight, and weights beyond 2^31 elements.

These run in processes of their own: a fault must fail a test and not end the session, and a peak of memory is the
process's.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
from support import cases
from support.paths import python_path

PREAMBLE = """
import faulthandler
faulthandler.enable()
import numpy, torch
from support import cases
from support.guarded import guarded
from nf4kernels import QuantizedWeight, dequantize, linear, quantize
from nf4kernels.backends.select import CPU_LIBRARY
ops = torch.ops.nf4kernels

def peak_mb():  # of this process alone: ru_maxrss begins with the parent's
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) / 1024
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | python_path() | {"OMP_WAIT_POLICY": "passive"} | environment
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], env=env, capture_output=True, encoding="utf-8", check=False
    )


def report(result: subprocess.CompletedProcess) -> str:
    return f"exit {result.returncode}, last case: {result.stdout.strip().splitlines()[-1:]}\n{result.stderr[-3000:]}"


GUARDED = """
at_end = {at_end}
FORMATS = tuple(((5, 192), layout) for layout in cases.FORMATS[:4])
def g(t, **options):
    return None if t is None else guarded(t, at_end, **options)

for shape, layout in cases.paired(cases.SHAPES + ((7, 16), (3, 8), (2, 24), (65, 160)), cases.LAYOUTS) + FORMATS:
    qweight = cases.random_bytes(*shape, layout)
    qweight = cases.with_tensors(qweight, **{{
        name: g(getattr(qweight, name))
        for name in ('packed', 'absmax', 'scale_absmax', 'scale_offset', 'code', 'scale_code')
    }})
    args = qweight.op_args()
    N, K = shape
    for dtype in cases.DTYPES:
        print(shape, layout, dtype, flush=True)
        ops.quantize(g(cases.weight(N, K, dtype)), qweight.code, layout.block_size)
        for rows, cols in (((0, N), (0, K)), ((N // 2, N), (K // 3, K)), ((0, 1), (K - 1, K))):
            out = g(torch.zeros(rows[1] - rows[0], cols[1] - cols[0], dtype=dtype), read_only=False)
            dequantize(qweight, out=out, rows=rows, cols=cols)
        for M in (1, 2, 3, 4, 5, 7, 12, 13, 16, 17, 33):
            x, dy = g(cases.activations(M, K, dtype)), g(cases.activations(M, N, dtype))
            ops.linear(x, *args, g(torch.zeros(N, dtype=dtype)))
            ops.linear_dgrad(dy, *args)
            for r in (1, 3, 8, 19):
                small = g(cases.activations(M, r, dtype))
                ops.linear(x, *args, None, small, g(cases.activations(N, r, dtype)))
                ops.linear_dgrad(dy, *args, small, g(cases.activations(r, K, dtype)))
                ops.lora_grad(small, x, 1.0, dtype)
                ops.lora_grad(small, dy, 1.0, torch.float32, True)
                if r in (1, 8):
                    continue
                ends = torch.tensor([M // 2, M // 2, M], dtype=torch.int32)
                ops.grouped_lora_inner(x, ends, g(cases.activations(3 * r, K, dtype).view(3, r, K)))
                ops.grouped_lora_inner(dy, ends, g(cases.activations(3 * N, r, dtype).view(3, N, r)), True)
                ops.grouped_lora_grad(small, x, ends, 1.0, dtype)
                ops.grouped_lora_grad(small, dy, ends, 1.0, torch.float32, True)
    absmax = g(torch.rand(N * K))
    for name, table in cases.codebook.SCALE_CODEBOOKS.items():
        ops.quantize_absmax(absmax, g(table), name == 'e4m3')
print('isa', CPU_LIBRARY.isa)
"""


LEVELS = [i for i in cases.IMPLEMENTATIONS if i != "reference"] or cases.ISAS


@pytest.mark.parametrize(
    ("level", "products", "at_end"),
    [
        *((i, "fused", at_end) for i in LEVELS for at_end in (True, False)),
        pytest.param(LEVELS[0], "dequantize_gemm", True, marks=pytest.mark.slow),
    ],
)
def test_nothing_outside_the_inputs_is_touched(native_library, level, products, at_end):
    """Inputs are read-only pages between forbidden ones; outputs given by the caller are guarded as well."""
    result = run(GUARDED.format(at_end=at_end), NF4KERNELS_CPU_ISA=level, NF4KERNELS_CPU_PRODUCTS=products)
    assert result.returncode == 0, report(result)
    assert result.stdout.strip().splitlines()[-1] == f"isa {level}"


def test_the_guard_bites():
    touch = "import ctypes; t = guarded(torch.ones(5), {}); ctypes.string_at(t.data_ptr() + {}, 1); print('alive')"
    for arguments, inside, outside in (("True", 19, 20), ("False", 0, -1)):
        assert run(touch.format(arguments, inside)).stdout == "alive\n"
        assert run(touch.format(arguments, outside)).returncode == -signal.SIGSEGV
    assert run("guarded(torch.ones(5)).fill_(2)").returncode == -signal.SIGSEGV


POISONED_MALLOC = """
FORMATS = (((33, 192), cases.FORMATS[1]),)
from support.numerics import assert_product_within_bound, assert_same_bits
for shape, layout in cases.paired(cases.SHAPES, cases.LAYOUTS) + FORMATS:
    N, K = shape
    qweight = cases.quantized(N, K, layout)
    w = cases.dense(qweight)
    for dtype in cases.DTYPES:
        assert_same_bits(dequantize(qweight, dtype), cases.dense(qweight, dtype), 'dequantize')
        for M in (1, 3, 17, 40):
            x, dy = cases.activations(M, K, dtype), cases.activations(M, N, dtype)
            assert_product_within_bound(ops.linear(x, *qweight.op_args(), None), x, w.T, 'linear')
            assert_product_within_bound(ops.linear_dgrad(dy, *qweight.op_args()), dy, w, 'linear_dgrad')
            P, A, B = cases.activations(M, 5, dtype), cases.activations(5, K, dtype), cases.activations(N, 5, dtype)
            y, dx = ops.linear(x, *qweight.op_args(), None, P, B), ops.linear_dgrad(dy, *qweight.op_args(), P, A)
            assert_product_within_bound(y, torch.cat([x, P], 1), torch.cat([w, B.float()], 1).T, 'linear low rank')
            assert_product_within_bound(dx, torch.cat([dy, P], 1), torch.cat([w, A.float()]), 'dgrad low rank')
    packed, absmax = cases.reference.quantize(cases.weight(N, K), layout.code, layout.block_size)
    ours = ops.quantize(cases.weight(N, K), layout.code, layout.block_size)
    assert_same_bits(ours[0], packed, 'packed')
    assert_same_bits(ours[1], absmax, 'absmax')
print('isa', CPU_LIBRARY.isa)
"""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("byte", [1, 128])
def test_no_kernel_reads_its_own_uninitialised_memory(native_library, level, byte):
    """glibc fills what malloc returns: 0xFE.. is -1.7e38 as fp32 and 0x7F.. is 3.4e38, so that a stray term shows."""
    result = run(POISONED_MALLOC, NF4KERNELS_CPU_ISA=level, MALLOC_PERTURB_=str(byte))
    assert result.returncode == 0, report(result)
    assert result.stdout.split()[-1] == level


NO_DENSE = """
N, K = 16384, 16384
tensors = dict(
    packed=torch.randint(0, 256, (N, K // 2), dtype=torch.uint8),
    absmax=torch.randint(0, 255, (N, K // 64), dtype=torch.uint8),
    scale_absmax=torch.rand(N * K // 64 // 256), scale_offset=torch.tensor(1.0),
    code=cases.DEFAULT.code, scale_code=cases.codebook.SCALE_CODEBOOKS['e4m3'],
)
qweight = QuantizedWeight(**tensors, shape=(N, K), dtype=torch.bfloat16, block_size=64, codebook='nf4',
                          scale_codebook='e4m3')
small = cases.quantized(192, 192)  # threads and their stacks, and the pages of torch's GEMM
for M in (1, 48):
    x = torch.randn(M, 192).{dtype}()
    ops.linear(x, *small.op_args(), None)
    ops.linear_dgrad(x, *small.op_args())
for M in (1, 4, 16, 48):
    x = torch.randn(M, K).{dtype}()
    before = peak_mb()
    ops.linear(x, *qweight.op_args(), None)
    ops.linear_dgrad(x, *qweight.op_args())
    print('extra', peak_mb() - before)
before = peak_mb()
dequantize(qweight)
print('dense', peak_mb() - before)
"""


@pytest.mark.parametrize(
    ("dtype", "products"), [("bfloat16", "fused"), ("float", "fused"), ("bfloat16", "dequantize_gemm")]
)
def test_no_dense_weight_is_allocated(native_library, dtype, products):
    """Ŵ would be 512 MB in bf16. A product may take its output (at most 3 MB here) and a workspace a thread, or a slice
    of at most 32 MB, which torch's GEMM may copy."""
    result = run(NO_DENSE.format(dtype=dtype), NF4KERNELS_CPU_PRODUCTS=products)
    assert result.returncode == 0, report(result)
    extra = [float(v) for v in re.findall(r"extra ([\d.]+)", result.stdout)]
    assert len(extra) == 4
    assert max(extra) < (32 if products == "fused" else 70), extra
    dense = float(re.search(r"dense ([\d.]+)", result.stdout)[1])
    assert dense > 450, "the measurement no longer sees a dense weight"


HUGE = """
N, K = 2**17 + 3, 2**15  # 2^32 elements and a little: offsets of elements, bytes and blocks pass 2^31 and 2^32
blocks = N * K // 64
def untouched(shape, dtype):
    return torch.from_numpy(numpy.zeros(shape, dtype))  # pages that nobody writes take no memory

packed, absmax = untouched((N, K // 2), numpy.uint8), untouched((N, K // 64), numpy.float32)
last = cases.random_bytes(5, K, cases.Layout(scale_codebook=None))
for begin in (0, 2**16 - 2, N - 5):
    packed[begin:begin + 5], absmax[begin:begin + 5] = last.packed, last.absmax
qweight = QuantizedWeight(packed, absmax, None, None, cases.DEFAULT.code, None, (N, K), torch.bfloat16, 64, 'nf4', None)
w = cases.dense(last)
for begin in (0, 2**16 - 2, N - 5):
    rows = (begin, begin + 5)
    assert torch.equal(dequantize(qweight, torch.float32, rows=rows), w), begin
    assert torch.equal(dequantize(qweight, torch.float32, rows=rows, cols=(K - 70, K)), w[:, -70:]), begin
for M in (1, 5):
    x = cases.activations(M, K, torch.bfloat16)
    y = linear(x, qweight)
    expected = linear(x, last)
    for begin in (0, 2**16 - 2, N - 5):
        assert torch.equal(y[:, begin:begin + 5], expected), (M, begin)
    y[:, :5], y[:, 2**16 - 2:2**16 + 3], y[:, -5:] = 0, 0, 0
    assert (y == 0).all()
    dy = torch.zeros(M, N).bfloat16()
    dy[:, -5:] = cases.activations(M, 5, torch.bfloat16)
    dx = ops.linear_dgrad(dy, *qweight.op_args())
    exact = dy[:, -5:].double() @ w.double()
    assert (dx.double() - exact).norm() <= 2**-7 * exact.norm(), M
"""


def test_more_than_2_to_the_32_elements(native_library):
    result = run(HUGE)
    assert result.returncode == 0, report(result)


HUGE_QUANTIZE = """
N, K = 2**15 + 1, 2**16 + 64  # 2^31 elements and a little
weight = torch.from_numpy(numpy.zeros((N, K), numpy.float16))  # never written, so that it takes no memory
tail = cases.weight(2, K, torch.float16)
weight[-2:] = tail
packed, absmax = ops.quantize(weight, cases.DEFAULT.code, 64)
expected = cases.reference.quantize(tail, cases.DEFAULT.code, 64)
assert torch.equal(packed[-2:], expected[0])
assert torch.equal(absmax[-2:], expected[1])
assert (packed[:-2:997] == 0x77).all()
assert (absmax[:-2] == 0).all()
"""


def test_quantize_more_than_2_to_the_31_elements(native_library):
    result = run(HUGE_QUANTIZE)
    assert result.returncode == 0, report(result)
