"""dequantize and dequantize_out: bit for bit the reference, whatever runs them."""

import pytest
import torch
from support import cases
from support.cases import DEFAULT, DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, Layout, dtype_id, paired, shape_id
from support.guarded import guarded, untouched
from support.numerics import assert_same_bits
from support.special import special_weight

from nf4kernels import reference

SENTINEL = 12345.0


def dequantize(way, qweight, dtype, rows=None, cols=None):
    N, K = qweight.shape
    return way.run("dequantize", *qweight.op_args(), *(rows or (0, N)), *(cols or (0, K)), dtype)


def dequantize_into(way, out, qweight, rows=None, cols=None):
    """`out` is on the way's device, so that its strides and address are the caller's."""
    N, K = qweight.shape
    way.ops.dequantize_out(*way.move(qweight.op_args()), *(rows or (0, N)), *(cols or (0, K)), out)


def assert_equals_reference(way, qweight, dtype, what=""):
    assert_same_bits(dequantize(way, qweight, dtype), cases.dense(qweight, dtype), f"dequantize {way} {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_shape(way, dtype):
    for shape in SHAPES:
        for layout in (DEFAULT, Layout(32, scale_codebook=None), Layout(1024), Layout(1024, scale_codebook=None)):
            assert_equals_reference(way, cases.random_bytes(*shape, layout), dtype, f"{shape} {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_layout(way, dtype):
    for layout in LAYOUTS:
        for shape in way.pick(((64, 96), (37, 100), (5, 4096), (3, 8191), (300, 1088)), ((37, 100), (3, 4097))):
            assert_equals_reference(way, cases.random_bytes(*shape, layout), dtype, f"{shape} {layout}")


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
def test_empty(way, shape):
    qweight = cases.random_bytes(*shape)
    for dtype in DTYPES:
        assert_equals_reference(way, qweight, dtype)
        dequantize_into(way, torch.empty(shape, dtype=dtype, device=way.device), qweight)


@pytest.mark.ways("cpu")
def test_output_of_several_huge_pages(way):
    for shape in ((1100, 1024), (1031, 2047)):
        assert_equals_reference(way, cases.random_bytes(*shape), torch.float32, f"{shape}")


def ranges(size):
    """All, none, single ends, and cuts inside and on the edge of a block."""
    cuts = {(0, size), (0, 0), (size, size), (0, 1), (size - 1, size), (size // 3, size - size // 4)}
    cuts |= {(begin, end) for begin, end in ((1, 2), (31, 65), (64, 128), (63, 129)) if end <= size}
    return sorted(cuts)


@pytest.mark.parametrize("shape", [(5, 64), (5, 63), (33, 65), (4, 100), (130, 1000), (3, 2080)], ids=shape_id)
def test_a_range_is_a_slice(way, shape):
    if not way.is_compiled and shape in ((130, 1000), (33, 65)):
        pytest.skip(f"{way}: the smaller shapes have every cut of a range too")
    layouts = DEFAULT, Layout(32, scale_codebook=None), Layout(512)
    every = [(layout, dtype) for layout in layouts for dtype in DTYPES]
    for layout, dtype in way.pick(every, paired(layouts, DTYPES)):
        qweight = cases.random_bytes(*shape, layout)
        whole = cases.dense(qweight, dtype)
        for rows in ranges(shape[0]):
            for cols in ranges(shape[1]):
                part = dequantize(way, qweight, dtype, rows, cols)
                assert part.is_contiguous()
                what = f"{way} {shape} {layout} rows {rows} cols {cols}"
                assert_same_bits(part, whole[slice(*rows), slice(*cols)], f"dequantize {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_out_writes_its_own_elements_only(way, dtype, offset):
    """A view with a row stride and any alignment, in a frame of sentinels."""
    for N, K in way.pick(((17, 64), (33, 65), (37, 100), (7, 1000)), ((17, 64), (33, 65), (7, 1000))):
        qweight = cases.random_bytes(N, K)
        whole = cases.dense(qweight, dtype)
        for rows, cols in (((0, N), (0, K)), ((2, N - 1), (5, K - 7))):
            n, k = rows[1] - rows[0], cols[1] - cols[0]
            frame = torch.full((n + 2, k + 24), SENTINEL, dtype=dtype, device=way.device)
            before = frame.clone()
            out = frame[1:-1, offset : offset + k]
            dequantize_into(way, out, qweight, rows, cols)
            assert_same_bits(
                out.cpu(), whole[slice(*rows), slice(*cols)], f"dequantize_out {way} {N}x{K} {rows} {cols}"
            )
            out.fill_(SENTINEL)
            assert torch.equal(frame, before), f"dequantize_out {way} {N}x{K}: wrote outside of out"


def test_out_with_one_column_or_row_of_any_stride(way):
    qweight = cases.random_bytes(6, 64)
    whole = cases.dense(qweight, torch.float32)
    for name, out, rows, cols in (
        ("one column", torch.empty(6, 100, device=way.device)[:, :1], (0, 6), (9, 10)),
        ("one row", torch.empty(64, 1, device=way.device).T, (3, 4), (0, 64)),
        ("expanded row", torch.empty(1, 64, device=way.device).expand(1, 64), (3, 4), (0, 64)),
    ):
        dequantize_into(way, out, qweight, rows, cols)
        assert_same_bits(out.cpu(), whole[slice(*rows), slice(*cols)], f"{name} {way}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_of_out_that_are_not_aligned_as_the_first(way, dtype):
    qweight = cases.random_bytes(5, 64)
    out = torch.zeros(5, 67, dtype=dtype, device=way.device)[:, :64]
    assert out.data_ptr() % 16 == 0
    dequantize_into(way, out, qweight)
    assert_same_bits(out.cpu(), cases.dense(qweight, dtype), f"stride of 67 {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("columns", [64, 96, 63])
def test_special_blocks(way, dtype, columns):
    """Denormal products, overflow of fp16, halves of the last place: all decided by fp32, then one rounding."""
    w = special_weight(columns)
    for scale_codebook in (None, "e4m3", "dynamic8"):
        for block_size in (32, 64):
            packed, absmax = reference.quantize(w, DEFAULT.code, block_size)
            layout = Layout(block_size, "nf4", scale_codebook)
            qweight = cases.from_parts(packed, absmax, tuple(w.shape), layout)
            assert_equals_reference(way, qweight, dtype, f"special, columns {columns}, {layout}")


def test_zero_blocks_decode_to_zero(way):
    w = torch.zeros(4, 64)
    qweight = cases.quantized_from(w, Layout(scale_codebook=None))
    for dtype in DTYPES:
        assert torch.equal(dequantize(way, qweight, dtype), w.to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_scale(way, value):
    """NaN fills its whole block; an infinite scale, which no encoder writes, gives what IEEE says: 0 * inf is NaN."""
    qweight = cases.random_bytes(8, 100, Layout(scale_codebook=None))
    qweight.absmax[3] = value
    for dtype in DTYPES:
        assert_equals_reference(way, qweight, dtype, f"absmax {value}")


@pytest.mark.ways("cpu", "executor", "cuda", "triton")
def test_scale_is_not_contracted_to_fma(way):
    """Where code * scale_absmax + offset would differ in an FMA, the two-rounding result is the right one.

    (The interpreter contracts nothing: test_compile_triton.py looks for it in what is compiled.)
    """
    qweight = cases.random_bytes(64, 4096)
    scale_code = qweight.scale_code[qweight.absmax.view(-1).long()]
    per_block = qweight.scale_absmax.repeat_interleave(256)[: scale_code.numel()]
    fused = (scale_code.double() * per_block.double() + qweight.scale_offset.double()).float()
    separate = scale_code * per_block + qweight.scale_offset
    assert (fused != separate).sum() > 100, "the inputs no longer tell the two apart"
    assert_equals_reference(way, qweight, torch.float32, "fma")


def test_rounds_once(way):
    """fp32 to fp16 by way of bf16, or truncation, would show on these."""
    qweight = cases.random_bytes(*way.pick((64, 4096), (16, 1024)))
    once = cases.dense(qweight, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        expected = torch.from_numpy(once.numpy().astype("float16")) if dtype == torch.float16 else once.to(dtype)
        assert_same_bits(dequantize(way, qweight, dtype), expected, f"{way} {dtype}")


def test_offset_views_of_one_buffer(way):
    """Slices that start at an odd address, as safetensors gives them."""
    qweight = cases.random_bytes(16, 96, Layout(32))
    moved = {}
    for name in ("packed", "absmax", "scale_absmax", "code", "scale_code"):
        tensor = getattr(qweight, name)
        buffer = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
        buffer[3:] = tensor.view(-1)
        moved[name] = buffer[3:].view(tensor.shape)
    expected = cases.dense(qweight, torch.float32)
    assert_same_bits(dequantize(way, cases.with_tensors(qweight, **moved), torch.float32), expected, f"{way} offset")


def test_bits_depend_on_no_schedule(way):
    qweight = cases.random_bytes(*way.pick((300, 1000), (5, 4100)))
    N, K = qweight.shape
    for dtype in DTYPES:
        first = dequantize(way, qweight, dtype)
        assert_same_bits(first, cases.dense(qweight, dtype), f"{way}")
        for schedule in way.schedules():
            assert_same_bits(dequantize(way, qweight, dtype), first, f"{way}, {schedule}")
            part = dequantize(way, qweight, dtype, (1, N - 1), (3, K - 99))
            assert_same_bits(part, first[1 : N - 1, 3 : K - 99], f"{way}, a range, {schedule}")


def test_result_is_the_callers_own(way):
    qweight = cases.random_bytes(8, 64)
    dequantize(way, qweight, torch.float32).zero_()
    assert_equals_reference(way, qweight, torch.float32, "after writing into an earlier result")


# What one way alone has.


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("width", [8, 64, 256, 264, 1000, 1016])
def test_aligned_columns_are_stored_16_bytes_at_a_time(executor_ops, width, dtype):
    """As many threads along a row as it needs, from one to all; whole groups at 16 bytes a store."""
    qweight = cases.random_bytes(19, 2048)
    out = torch.full((19, 2048), SENTINEL, dtype=dtype)
    dequantize_into(executor_ops, out[:, :width], qweight, cols=(512, 512 + width))
    assert_same_bits(out[:, :width], cases.dense(qweight, dtype)[:, 512 : 512 + width], f"{width} columns, {dtype}")
    assert (out[:, width:] == SENTINEL).all()
    assert len(executor_ops.launches()) == 1
    assert "true" in executor_ops.launches()[0].kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (5, 63), (2, 1028), (3, 1000)], ids=shape_id)
def test_reads_and_writes_nothing_outside(executor_ops, shape, dtype):
    """Of the CPU's kernels test_memory.py says so."""
    for layout in (DEFAULT, Layout(32, scale_codebook=None)):
        qweight = cases.random_bytes(*shape, layout)
        for at_end in (True, False):
            names = ("packed", "absmax", "scale_absmax", "code", "scale_code", "scale_offset")
            tensors = {n: guarded(getattr(qweight, n), at_end) for n in names if getattr(qweight, n) is not None}
            near = cases.with_tensors(qweight, **tensors)
            out = guarded(torch.zeros(shape, dtype=dtype), at_end, read_only=False)
            dequantize_into(executor_ops, out, near)
            assert_same_bits(out, cases.dense(qweight, dtype), f"guarded {shape} {layout}")
            assert_equals_reference(executor_ops, near, dtype, f"guarded {shape} {layout}")


@pytest.mark.ways("executor", "interpreter")
@pytest.mark.parametrize("K", [2**16, 2**16 + 1, 2**16 + 8])
def test_indices_past_2_to_the_32(way, K):
    """The last row and eight columns of a weight most of which is never touched."""
    N = 2**17
    near = cases.random_bytes(1, 40 * 16384)
    start = (N * K // 16384 - 20) * 16384  # a superblock's begin
    count = N * K - start
    packed, absmax = untouched(-(-N * K // 2), torch.uint8), untouched(-(-N * K // 64), torch.uint8)
    scale_absmax = untouched(-(-N * K // 16384), torch.float32)
    for far, small, step in (
        (packed, near.packed, 2),
        (absmax, near.absmax, 64),
        (scale_absmax, near.scale_absmax, 16384),
    ):
        far[start // step :] = small.view(-1)[: len(far) - start // step]
    expected = cases.dense(near).view(-1)[:count]
    weight = (packed, absmax, scale_absmax, near.scale_offset, near.code, near.scale_code, N, K, 64)
    for dtype in (torch.float32, torch.bfloat16):
        row = way.ops.dequantize(*weight, N - 1, N, 0, K, dtype)
        assert_same_bits(row, expected[-K:].to(dtype).view(1, -1), f"last row of {N} x {K}")
        part = way.ops.dequantize(*weight, N - 3, N, K - 9, K - 1, dtype)
        assert_same_bits(part, expected[-3 * K :].view(3, K)[:, -9:-1].to(dtype), f"columns of {N} x {K}")
