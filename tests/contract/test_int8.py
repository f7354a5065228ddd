"""int8: a byte a weight. The properties that 4 bits have, over every way that runs it."""

import pytest
import torch
from support import cases
from support.cases import BLOCK_SIZES, DTYPES, EMPTY_SHAPES, Layout, dtype_id, paired, shape_id
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased
from support.special import FINITE_BLOCKS, special_weight

from nf4kernels import reference
from nf4kernels.codebook import INT8_CODE

LAYOUTS = (
    Layout(codebook="int8"),
    Layout(64, "int8", None),
    Layout(64, "int8", "dynamic8"),
    Layout(32, "int8", None, "bfloat16"),
    Layout(16, "int8", None, "float16"),
    *(Layout(b, "int8") for b in BLOCK_SIZES if b != 64),
)
SHAPES = ((1, 1), (3, 5), (17, 32), (5, 63), (16, 64), (33, 65), (64, 96), (37, 100), (129, 31), (48, 320), (19, 2080))
ALL = pytest.mark.ways("cpu", "interpreter", "triton")


def quantized(N, K, layout):
    qweight = cases.from_parts(*reference.quantize(cases.weight(N, K), INT8_CODE, layout.block_size), (N, K), layout)
    if layout.scale_codebook is not None:
        return qweight
    return cases.with_tensors(qweight, absmax=qweight.absmax.to(getattr(torch, layout.numbers)))


def product(op, way, a, qweight, lora=None, bias=None):
    args = (a, *qweight.op_args(), *((bias,) if op == "linear" else ()))
    if lora is None:
        return way.run(op, *args)
    inner, factor, scaling = lora  # factor [r, columns]
    return way.run(op, *args, inner, factor.T.contiguous() if op == "linear" else factor, scaling)


def matrix_of(op, qweight):
    w = cases.dense(qweight)
    return w.T if op == "linear" else w


def assert_right(op, way, M, qweight, dtype, mean=0.0, r=0, has_bias=False):
    matrix = matrix_of(op, qweight)
    a, lora, joined = cases.activations(M, matrix.shape[0], dtype, mean), None, None
    if r:
        inner, factor = cases.activations(M, r, dtype, seed=3), cases.activations(r, matrix.shape[1], dtype, seed=4)
        lora, joined = (inner, factor, 1.75), (torch.cat([a, inner], 1), torch.cat([matrix, 1.75 * factor.float()], 0))
    bias = torch.randn(matrix.shape[1]).to(dtype) if has_bias and op == "linear" else None
    y = product(op, way, a, qweight, lora, bias)
    assert_product_within_bound(y, *(joined or (a, matrix)), f"{op} {way} int8 {tuple(qweight.shape)} M={M}", bias)
    return a, y


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_quantize_is_the_reference(way, dtype):
    for shape, layout in paired(SHAPES, LAYOUTS):
        for bad in (None, torch.nan, -torch.inf):
            w = cases.weight(*shape, dtype)
            if bad is not None:
                w.view(-1)[w.numel() // 2] = bad
            packed, scale = way.run("quantize", w, INT8_CODE, layout.block_size)
            expected = reference.quantize(w, INT8_CODE, layout.block_size)
            assert_same_bits(packed, expected[0], f"{way} {shape} {layout}")
            assert_same_bits(scale, expected[1], f"{way} {shape} {layout}")
            assert (packed != 128).all()


@ALL
def test_quantize_of_special_blocks(way):
    for dtype in DTYPES:
        names = [n for n, block in FINITE_BLOCKS.items() if block.to(dtype).isfinite().all()]
        w = special_weight(96, names).to(dtype)
        for block_size in (32, 64):
            got, expected = way.run("quantize", w, INT8_CODE, block_size), reference.quantize(w, INT8_CODE, block_size)
            for a, b in zip(got, expected):
                assert_same_bits(a, b, f"{way} {dtype} {block_size}")


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_ties_go_to_the_even_integer(way, dtype):
    """Halves are exact where absmax is 127: every one within the block, and the floats about it."""
    halves = torch.arange(-126.5, 127, 1.0)
    values = torch.cat([halves, halves * (1 + 2.0**-23), halves * (1 - 2.0**-23)]).to(dtype)
    values = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    blocks = torch.cat([torch.full((len(values), 1), 127.0, dtype=dtype), values], 1)
    packed, scale = way.run("quantize", blocks, INT8_CODE, 32)
    assert (scale == 1).all()
    expected = reference.quantize(blocks, INT8_CODE, 32)[0]
    assert_same_bits(packed, expected, f"{way} ties")
    distance = (packed.view(torch.int8).double() - blocks.double()).abs()
    assert (distance <= 0.5 + 127 * 2.0**-22).all(), "w * (1 / 127) * 127 misses w by its three roundings at most"


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dequantize_is_the_reference(way, dtype):
    for shape, layout in paired(SHAPES, LAYOUTS):
        N, K = shape
        for qweight in (quantized(N, K, layout), cases.random_bytes(N, K, layout)):  # every byte, -128 too
            whole = cases.dense(qweight, dtype)
            for rows, cols in (((0, N), (0, K)), ((N // 2, N), (K // 3, K)), ((0, 1), (K - 1, K)), ((0, 0), (0, K))):
                part = way.run("dequantize", *qweight.op_args(), *rows, *cols, dtype)
                assert_same_bits(part, whole[slice(*rows), slice(*cols)], f"{way} {shape} {layout} {rows} {cols}")


@ALL
def test_out_writes_its_own_elements_only(way):
    qweight = cases.random_bytes(7, 100, LAYOUTS[0])
    for dtype in DTYPES:
        frame = torch.full((9, 120), 12345.0, dtype=dtype, device=way.device)
        way.ops.dequantize_out(*way.move(qweight.op_args()), 0, 7, 3, 97, frame[1:-1, 5:99])
        assert_same_bits(frame[1:-1, 5:99].cpu(), cases.dense(qweight, dtype)[:, 3:97], f"{way}")
        frame[1:-1, 5:99] = 12345
        assert (frame == 12345).all()


@ALL
@pytest.mark.every_kernel
@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_every_shape_and_layout(way, op):
    if way.kernel == "dequantize_gemm" or way.is_compiled:
        pairs = paired(SHAPES, LAYOUTS)
    else:
        pairs = [((37, 100), LAYOUTS[0]), ((33, 192), LAYOUTS[1]), ((40, 320), LAYOUTS[4])]
    for i, (shape, layout) in enumerate(pairs):
        qweight = quantized(*shape, layout)
        for dtype in way.dtypes(op):
            for M in way.pick((0, 1, 2, 3, 4, 5, 13, 17, 129), (1, 17)):
                r = (0, 5, 16)[(i + M) % 3]
                assert_right(op, way, M, qweight, dtype, float(M % 2), r, has_bias=M % 3 == 0)


@ALL
@pytest.mark.every_kernel
@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_long_depth_a_mean_and_no_bias_of_rounding(way, op):
    """K beyond a slice of the gemv, runs of the GEMM and depths of splits."""
    N, K = (64, 9216) if op == "linear" else (4096, 64)
    qweight = quantized(N, K, LAYOUTS[0])
    for dtype in way.pick(way.dtypes(op), (torch.bfloat16,)):
        for M in way.pick((1, 4, 16), (16,)):
            a, y = assert_right(op, way, M, qweight, dtype, 1.0)
            if dtype != torch.float32 and M == 16:
                assert_unbiased(y, a, matrix_of(op, qweight), f"{op} {way}")


@pytest.mark.ways("cpu")
@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_rows_do_not_see_each_other_nor_the_threads(way, op):
    if way.is_reference:
        pytest.skip("torch's own product")
    qweight = quantized(48, 320, LAYOUTS[0])
    for dtype in DTYPES:
        for M in (2, 4, 5, 33):
            a = cases.activations(M, matrix_of(op, qweight).shape[0], dtype)
            plain = product(op, way, a, qweight)
            other = torch.full_like(a, torch.nan)
            other[1] = a[1]
            assert_same_bits(product(op, way, other, qweight)[1], plain[1], f"{op} {way} M={M}")
            for schedule in way.schedules():
                assert_same_bits(product(op, way, a, qweight), plain, f"{op} {way} {schedule}")


@ALL
@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_a_nan_block_reaches_its_columns_only(way, op):
    qweight = quantized(40, 192, LAYOUTS[1])
    absmax = qweight.absmax.clone()
    absmax.view(-1)[7] = torch.nan
    struck = cases.with_tensors(qweight, absmax=absmax)
    hit = matrix_of(op, struck).isnan().any(0)
    for M in (1, 9):
        a = cases.activations(M, matrix_of(op, qweight).shape[0], torch.bfloat16)
        y = product(op, way, a, struck)
        assert y[:, hit].isnan().all()
        assert_same_bits(y[:, ~hit], product(op, way, a, qweight)[:, ~hit], f"{op} {way}")


@ALL
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
def test_empty(way, shape):
    qweight = quantized(*shape, LAYOUTS[0])
    for M in (0, 1, 7):
        y = product("linear", way, torch.ones(M, shape[1]), qweight, bias=torch.arange(float(shape[0])))
        assert y.shape == (M, shape[0])
        if shape[1] == 0:
            assert torch.equal(y, torch.arange(float(shape[0])).expand(M, -1))
        assert product("linear_dgrad", way, torch.ones(M, shape[0]), qweight).shape == (M, shape[1])
    assert way.run("quantize", torch.zeros(shape), INT8_CODE, 64)[0].shape == shape


@ALL
def test_experts_are_their_weights(way):
    weights = [quantized(40, 128, LAYOUTS[0]) for _ in range(3)]
    qexperts, ends = cases.stacked(weights), torch.tensor([2, 2, 7], dtype=torch.int32)
    for dtype in way.pick(DTYPES, (torch.bfloat16,)):
        for op, depth in (("linear", 128), ("linear_dgrad", 40)):
            a = cases.activations(9, depth, dtype)
            y = way.run(f"grouped_{op}", a, ends, *qexperts.op_args())
            assert (y[7:] == 0).all()
            for rows, e in ((slice(0, 2), 0), (slice(2, 7), 2)):
                assert_product_within_bound(y[rows], a[rows], matrix_of(op, weights[e]), f"grouped {op} {way} {e}")


@pytest.mark.ways("cpu")
def test_nothing_outside_the_inputs_is_read(way):
    """Each tensor ends, or begins, at a page that may not be touched."""
    for at_end in (True, False):
        for shape, layout in paired(((7, 16), (3, 8), (65, 160), (33, 65), (5, 2080)), LAYOUTS[:5]):
            qweight = cases.random_bytes(*shape, layout)
            names = ("packed", "absmax", "scale_absmax", "scale_offset", "scale_code")
            tensors = {name: getattr(qweight, name) for name in names}
            qweight = cases.with_tensors(
                qweight, **{name: guarded(t, at_end) for name, t in tensors.items() if t is not None}
            )
            for dtype in DTYPES:
                way.run("quantize", guarded(cases.weight(*shape, dtype), at_end), INT8_CODE, layout.block_size)
                way.run("dequantize", *qweight.op_args(), 0, shape[0], 0, shape[1], dtype)
                for M in (1, 4, 5, 17):
                    for op, depth in (("linear", shape[1]), ("linear_dgrad", shape[0])):
                        product(op, way, guarded(cases.activations(M, depth, dtype), at_end), qweight)


@ALL
def test_bytes_of_another_size_are_refused(way):
    qweight = quantized(8, 64, LAYOUTS[0])
    for change in ({"packed": qweight.packed[:, :32].contiguous()}, {"code": qweight.code[:255].contiguous()}):
        packed, absmax, scale_absmax, scale_offset, code, *rest = qweight.op_args()
        packed, code = change.get("packed", packed), change.get("code", code)
        with pytest.raises(RuntimeError, match=r"must have .* elements"):
            way.run("linear", torch.ones(2, 64), packed, absmax, scale_absmax, scale_offset, code, *rest, None)


@pytest.mark.ways("executor", "cuda")
def test_the_cuda_library_hands_int8_on(way):
    """It launches nothing of its own: on a card Triton runs, and under the executor, on CPU tensors, the reference."""
    w, layout = cases.weight(37, 128), LAYOUTS[0]
    packed, scale = way.run("quantize", w, INT8_CODE, 64)
    assert_same_bits(packed, reference.quantize(w, INT8_CODE, 64)[0], f"{way}")
    assert_same_bits(scale, reference.quantize(w, INT8_CODE, 64)[1], f"{way}")
    qweight = quantized(37, 128, layout)
    assert_same_bits(
        way.run("dequantize", *qweight.op_args(), 1, 30, 3, 99, torch.bfloat16),
        cases.dense(qweight, torch.bfloat16)[1:30, 3:99],
        f"{way}",
    )
    out = torch.empty(37, 128, device=way.device)
    way.ops.dequantize_out(*way.move(qweight.op_args()), 0, 37, 0, 128, out)
    assert_same_bits(out.cpu(), cases.dense(qweight), f"{way}")
    for M, r in ((1, 0), (5, 4), (40, 16)):
        assert_right("linear", way, M, qweight, torch.bfloat16, r=r, has_bias=True)
        assert_right("linear_dgrad", way, M, qweight, torch.float32, r=r)
    qexperts, ends = cases.stacked([quantized(40, 128, layout)] * 2), torch.tensor([2, 5], dtype=torch.int32)
    for op, depth in (("linear", 128), ("linear_dgrad", 40)):
        a = cases.activations(5, depth, torch.bfloat16)
        y = way.run(f"grouped_{op}", a, ends, *qexperts.op_args())
        assert_product_within_bound(y, a, matrix_of(op, quantized(40, 128, layout)), f"{way} grouped {op}")
    assert not [name for name in way.kernel_names() or () if "quantize" in name or "linear" in name]
