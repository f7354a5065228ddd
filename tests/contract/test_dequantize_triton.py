"""dequantize and dequantize_out in Triton, bit for bit the reference, under Triton's interpreter and on a GPU."""

import pytest
import torch
from support import cases
from support.cases import DEFAULT, DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, Layout, dtype_id, shape_id
from support.guarded import untouched
from support.numerics import assert_same_bits
from support.special import special_weight
from test_dequantize import SENTINEL, ranges
from test_dequantize_cuda import assert_dequantize_equals_reference, dequantize

from nf4kernels import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_shape(triton_ops, dtype):
    for shape in SHAPES + EMPTY_SHAPES:
        for layout in (DEFAULT, Layout(32, scale_codebook=None), Layout(1024))[: 3 if dtype == torch.float32 else 1]:
            qweight = cases.random_bytes(*shape, layout)
            assert_dequantize_equals_reference(triton_ops, qweight, dtype, f"{shape} {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_layout(triton_ops, dtype):
    for layout in LAYOUTS:
        for shape in ((37, 100), (3, 4097)):
            qweight = cases.random_bytes(*shape, layout)
            assert_dequantize_equals_reference(triton_ops, qweight, dtype, f"{shape} {layout}")


@pytest.mark.parametrize("shape", [(5, 64), (5, 63), (4, 100), (3, 2080)], ids=shape_id)
def test_ranges(triton_ops, shape):
    for layout, dtype in ((DEFAULT, torch.bfloat16), (Layout(512, scale_codebook=None), torch.float32)):
        qweight = cases.random_bytes(*shape, layout)
        whole = cases.dense(qweight, dtype)
        for rows in ranges(shape[0]):
            for cols in ranges(shape[1]):
                part = dequantize(triton_ops, qweight, dtype, rows, cols).cpu()
                what = f"{shape} {layout} rows {rows} cols {cols}"
                assert_same_bits(part, whole[slice(*rows), slice(*cols)], f"dequantize {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(17, 64), (33, 65), (7, 1000)], ids=shape_id)
def test_out_writes_its_own_elements_only(triton_ops, shape, dtype):
    """A view with a row stride and any alignment, in a frame of sentinels."""
    N, K = shape
    qweight = cases.random_bytes(N, K)
    whole = cases.dense(qweight, dtype)
    for rows, cols, offset in (((0, N), (0, K), 0), ((2, N - 1), (5, K - 7), 1)):
        n, k = rows[1] - rows[0], cols[1] - cols[0]
        frame = torch.full((n + 2, k + 24), SENTINEL, dtype=dtype, device=triton_ops.device)
        untouched_frame = frame.clone()
        out = frame[1:-1, offset : offset + k]
        triton_ops.ops.dequantize_out(*triton_ops.move(qweight.op_args()), *rows, *cols, out)
        assert_same_bits(out.cpu(), whole[slice(*rows), slice(*cols)], f"dequantize_out {shape} {rows} {cols}")
        out.fill_(SENTINEL)
        assert torch.equal(frame, untouched_frame), f"dequantize_out {shape}: wrote outside of out"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("columns", [64, 63])
def test_special_blocks(triton_ops, dtype, columns):
    """Denormal products, overflow of fp16, halves of the last place: all decided by fp32, then one rounding."""
    w = special_weight(columns)
    for scale_codebook in (None, "e4m3", "dynamic8"):
        packed, absmax = reference.quantize(w, DEFAULT.code, 64)
        qweight = cases.from_parts(packed, absmax, tuple(w.shape), Layout(64, "nf4", scale_codebook))
        assert_dequantize_equals_reference(triton_ops, qweight, dtype, f"special, columns {columns}, {scale_codebook}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_scale(triton_ops, value):
    qweight = cases.random_bytes(8, 100, Layout(scale_codebook=None))
    qweight.absmax[3] = value
    for dtype in DTYPES:
        assert_dequantize_equals_reference(triton_ops, qweight, dtype, f"absmax {value} {dtype}")


def test_scale_is_not_contracted_to_fma(triton_gpu):
    """On a GPU; test_compile_triton.py looks for it in what is compiled."""
    qweight = cases.random_bytes(64, 4096)
    assert_dequantize_equals_reference(triton_gpu, qweight, torch.float32, "fma")


@pytest.mark.parametrize("K", [2**16, 2**16 + 1])
def test_indices_past_2_to_the_32(interpreter, K):
    """The last rows and eight columns of a weight most of which is never touched."""
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
    row = interpreter.ops.dequantize(*weight, N - 1, N, 0, K, torch.float32)
    assert_same_bits(row, expected[-K:].view(1, -1), f"last row of {N} x {K}")
    part = interpreter.ops.dequantize(*weight, N - 3, N, K - 9, K - 1, torch.float32)
    assert_same_bits(part, expected[-3 * K :].view(3, K)[:, -9:-1], f"columns of {N} x {K}")
