"""dequantize and dequantize_out, bit for bit the reference, at every instruction set."""

import pytest
import torch
from support import cases
from support.cases import DEFAULT, DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, Layout, dtype_id, shape_id
from support.numerics import assert_same_bits
from support.special import special_weight

from nf4kernels import dequantize, reference

SENTINEL = 12345.0


def assert_dequantize_equals_reference(qweight, dtype, what):
    assert_same_bits(dequantize(qweight, dtype), cases.dense(qweight, dtype), f"dequantize {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_shape(isa, shape, dtype):
    for layout in (DEFAULT, Layout(scale_codebook=None), Layout(32), Layout(1024, scale_codebook=None)):
        assert_dequantize_equals_reference(cases.random_bytes(*shape, layout), dtype, f"{isa} {shape} {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(isa, layout, dtype):
    for shape in ((64, 96), (37, 100), (5, 4096), (3, 8191), (300, 1088)):
        assert_dequantize_equals_reference(cases.random_bytes(*shape, layout), dtype, f"{isa} {shape} {layout}")


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
def test_empty(isa, shape):
    qweight = cases.random_bytes(*shape)
    assert dequantize(qweight).shape == shape
    assert dequantize(qweight, out=torch.empty(shape)).shape == shape


def test_output_of_several_huge_pages(isa):
    for shape in ((1100, 1024), (1031, 2047)):
        assert_dequantize_equals_reference(cases.random_bytes(*shape), torch.float32, f"{isa} {shape}")


def ranges(size):
    """All, none, single ends, and cuts inside and on the edge of a block."""
    cuts = {(0, size), (0, 0), (size, size), (0, 1), (size - 1, size), (size // 3, size - size // 4)}
    cuts |= {(begin, end) for begin, end in ((1, 2), (31, 65), (64, 128), (63, 129)) if end <= size}
    return sorted(cuts)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(5, 64), (5, 63), (33, 65), (4, 100), (130, 1000), (3, 2080)], ids=shape_id)
def test_ranges(isa, shape, dtype):
    for layout in (DEFAULT, Layout(32, scale_codebook=None), Layout(512)):
        qweight = cases.random_bytes(*shape, layout)
        whole = cases.dense(qweight, dtype)
        for rows in ranges(shape[0]):
            for cols in ranges(shape[1]):
                part = dequantize(qweight, dtype, rows=rows, cols=cols)
                what = f"{isa} {shape} {layout} rows {rows} cols {cols}"
                assert part.is_contiguous()
                assert_same_bits(part, whole[slice(*rows), slice(*cols)], f"dequantize {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(17, 64), (33, 65), (37, 100), (7, 1000)], ids=shape_id)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_out_writes_its_own_elements_only(isa, shape, dtype, offset):
    """A view with a row stride and any alignment, in a frame of sentinels."""
    N, K = shape
    qweight = cases.random_bytes(N, K)
    whole = cases.dense(qweight, dtype)
    for rows, cols in (((0, N), (0, K)), ((2, N - 1), (5, K - 7))):
        n, k = rows[1] - rows[0], cols[1] - cols[0]
        frame = torch.full((n + 2, k + 24), SENTINEL, dtype=dtype)
        untouched = frame.clone()
        out = frame[1:-1, offset : offset + k]
        assert dequantize(qweight, out=out, rows=rows, cols=cols) is out
        assert_same_bits(out, whole[slice(*rows), slice(*cols)], f"dequantize_out {isa} {shape} {rows} {cols}")
        out.fill_(SENTINEL)
        assert torch.equal(frame, untouched), f"dequantize_out {isa} {shape}: wrote outside of out"


def test_out_with_one_column_or_row_of_any_stride(isa):
    qweight = cases.random_bytes(6, 64)
    whole = cases.dense(qweight, torch.float32)
    out = torch.empty(6, 100)[:, :1]
    assert_same_bits(dequantize(qweight, out=out, cols=(9, 10)), whole[:, 9:10], f"one column {isa}")
    out = torch.empty(64, 1).T
    assert out.stride(1) == 1
    assert_same_bits(dequantize(qweight, out=out, rows=(3, 4)), whole[3:4], f"one row {isa}")
    out = torch.empty(1, 64).expand(1, 64)
    assert_same_bits(dequantize(qweight, out=out, rows=(3, 4)), whole[3:4], f"expanded row {isa}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("columns", [64, 96, 63])
def test_special_blocks(isa, dtype, columns):
    """Denormal products, overflow of fp16, halves of the last place: all decided by fp32, then one rounding."""
    w = special_weight(columns)
    for scale_codebook in (None, "e4m3", "dynamic8"):
        for block_size in (32, 64):
            packed, absmax = reference.quantize(w, DEFAULT.code, block_size)
            layout = Layout(block_size, "nf4", scale_codebook)
            qweight = cases.from_parts(packed, absmax, tuple(w.shape), layout)
            assert_dequantize_equals_reference(qweight, dtype, f"{isa} special, columns {columns}, {layout}")


def test_zero_blocks_decode_to_zero(isa):
    w = torch.zeros(4, 64)
    packed, absmax = reference.quantize(w, DEFAULT.code, 64)
    qweight = cases.from_parts(packed, absmax, (4, 64), Layout(scale_codebook=None))
    for dtype in DTYPES:
        assert torch.equal(dequantize(qweight, dtype), w.to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_scale(isa, value):
    """NaN fills its whole block; an infinite scale, which no encoder writes, gives what IEEE says: 0 * inf is NaN."""
    qweight = cases.random_bytes(8, 100, Layout(scale_codebook=None))
    qweight.absmax[3] = value
    for dtype in DTYPES:
        assert_dequantize_equals_reference(qweight, dtype, f"{isa} absmax {value} {dtype}")


def test_scale_is_not_contracted_to_fma(isa):
    """Where code * scale_absmax + offset would differ in an FMA, the two-rounding result is the right one."""
    qweight = cases.random_bytes(64, 4096)
    scale_code = qweight.scale_code[qweight.absmax.view(-1).long()]
    per_block = qweight.scale_absmax.repeat_interleave(256)[: scale_code.numel()]
    fused = (scale_code.double() * per_block.double() + qweight.scale_offset.double()).float()
    separate = scale_code * per_block + qweight.scale_offset
    assert (fused != separate).sum() > 100, "the inputs no longer tell the two apart"
    assert_dequantize_equals_reference(qweight, torch.float32, f"{isa} fma")


def test_rounds_once(isa):
    """fp32 to fp16 by way of bf16, or truncation, would show on these."""
    qweight = cases.random_bytes(64, 4096)
    once = cases.dense(qweight, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        expected = torch.from_numpy(once.numpy().astype("float16")) if dtype == torch.float16 else once.to(dtype)
        assert_same_bits(dequantize(qweight, dtype), expected, f"{isa} {dtype}")


def test_offset_views_of_one_buffer(isa):
    """Slices that start at an odd address, as safetensors gives them."""
    qweight = cases.random_bytes(16, 96, Layout(32))
    moved = {}
    for name in ("packed", "absmax", "scale_absmax", "code", "scale_code"):
        tensor = getattr(qweight, name)
        buffer = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
        buffer[3:] = tensor.view(-1)
        moved[name] = buffer[3:].view(tensor.shape)
    expected = cases.dense(qweight, torch.float32)
    assert_same_bits(dequantize(cases.with_tensors(qweight, **moved), torch.float32), expected, f"{isa} offset")


def test_threads_do_not_change_bits(isa):
    qweight = cases.random_bytes(300, 1000)
    torch.set_num_threads(1)
    one = dequantize(qweight)
    torch.set_num_threads(2)
    assert_same_bits(dequantize(qweight), one, f"{isa} threads")


def test_result_is_the_callers_own(isa):
    qweight = cases.random_bytes(8, 64)
    first = dequantize(qweight, torch.float32)
    first.zero_()
    assert_dequantize_equals_reference(qweight, torch.float32, f"{isa} after writing into an earlier result")
