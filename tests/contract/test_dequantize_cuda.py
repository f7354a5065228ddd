"""dequantize and dequantize_out in CUDA, bit for bit the reference, on the host executor and a GPU."""

import pytest
import torch
from support import cases
from support.cases import DEFAULT, DTYPES, LAYOUTS, SHAPES, Layout, dtype_id, shape_id
from support.guarded import guarded, untouched
from support.numerics import assert_same_bits
from support.special import special_weight
from test_dequantize import SENTINEL, ranges

from nf4kernels import reference


def dequantize(cuda_ops, qweight, dtype, rows=None, cols=None):
    (r0, r1), (c0, c1) = rows or (0, qweight.shape[0]), cols or (0, qweight.shape[1])
    return cuda_ops.ops.dequantize(*cuda_ops.move(qweight.op_args()), r0, r1, c0, c1, dtype)


def assert_dequantize_equals_reference(cuda_ops, qweight, dtype, what):
    assert_same_bits(dequantize(cuda_ops, qweight, dtype).cpu(), cases.dense(qweight, dtype), f"dequantize {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_shape(cuda_ops, shape, dtype):
    for layout in (DEFAULT, Layout(32, scale_codebook=None), Layout(1024)):
        assert_dequantize_equals_reference(cuda_ops, cases.random_bytes(*shape, layout), dtype, f"{shape} {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(cuda_ops, layout, dtype):
    for shape in ((37, 100), (5, 4096), (3, 8191)):
        assert_dequantize_equals_reference(cuda_ops, cases.random_bytes(*shape, layout), dtype, f"{shape} {layout}")


def test_every_schedule(executor_ops):
    for setting in executor_ops.settings():
        for dtype in DTYPES:
            qweight = cases.random_bytes(5, 4100)
            assert_dequantize_equals_reference(executor_ops, qweight, dtype, f"{setting}")
            part = dequantize(executor_ops, qweight, dtype, (1, 4), (3, 4001))
            assert_same_bits(part, cases.dense(qweight, dtype)[1:4, 3:4001], f"dequantize {setting}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(5, 64), (5, 63), (33, 65), (4, 100), (7, 2080)], ids=shape_id)
def test_ranges(cuda_ops, shape, dtype):
    for layout in (DEFAULT, Layout(512, scale_codebook=None)):
        qweight = cases.random_bytes(*shape, layout)
        whole = cases.dense(qweight, dtype)
        for rows in ranges(shape[0]):
            for cols in ranges(shape[1]):
                part = dequantize(cuda_ops, qweight, dtype, rows, cols).cpu()
                assert part.is_contiguous()
                what = f"{shape} {layout} rows {rows} cols {cols}"
                assert_same_bits(part, whole[slice(*rows), slice(*cols)], f"dequantize {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("width", [8, 64, 256, 264, 1000, 1016])
def test_slices_of_aligned_columns(executor_ops, width, dtype):
    """As many threads along a row as it needs, from one to all; whole groups at 16 bytes a store."""
    qweight = cases.random_bytes(19, 2048)
    out = torch.full((19, 2048), SENTINEL, dtype=dtype)
    executor_ops.ops.dequantize_out(*qweight.op_args(), 0, 19, 512, 512 + width, out[:, :width])
    assert_same_bits(out[:, :width], cases.dense(qweight, dtype)[:, 512 : 512 + width], f"slice {width} {dtype}")
    assert (out[:, width:] == SENTINEL).all()
    assert len(executor_ops.launches()) == 1
    assert "true" in executor_ops.launches()[0].kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(17, 64), (33, 65), (7, 1000)], ids=shape_id)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_out_writes_its_own_elements_only(cuda_ops, shape, dtype, offset):
    """A view with a row stride and any alignment, in a frame of sentinels."""
    N, K = shape
    qweight = cases.random_bytes(N, K)
    whole = cases.dense(qweight, dtype)
    for rows, cols in (((0, N), (0, K)), ((2, N - 1), (5, K - 7))):
        n, k = rows[1] - rows[0], cols[1] - cols[0]
        frame = torch.full((n + 2, k + 24), SENTINEL, dtype=dtype, device=cuda_ops.device)
        untouched_frame = frame.clone()
        out = frame[1:-1, offset : offset + k]
        cuda_ops.ops.dequantize_out(*cuda_ops.move(qweight.op_args()), *rows, *cols, out)
        assert_same_bits(out.cpu(), whole[slice(*rows), slice(*cols)], f"dequantize_out {shape} {rows} {cols}")
        out.fill_(SENTINEL)
        assert torch.equal(frame, untouched_frame), f"dequantize_out {shape}: wrote outside of out"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (5, 63), (2, 1028), (3, 1000)], ids=shape_id)
def test_reads_and_writes_nothing_outside(executor_ops, shape, dtype):
    for layout in (DEFAULT, Layout(32, scale_codebook=None)):
        qweight = cases.random_bytes(*shape, layout)
        for at_end in (True, False):
            names = ("packed", "absmax", "scale_absmax", "code", "scale_code", "scale_offset")
            tensors = {n: guarded(getattr(qweight, n), at_end) for n in names if getattr(qweight, n) is not None}
            near = cases.with_tensors(qweight, **tensors)
            out = guarded(torch.zeros(shape, dtype=dtype), at_end, read_only=False)
            executor_ops.ops.dequantize_out(*near.op_args(), 0, shape[0], 0, shape[1], out)
            assert_same_bits(out, cases.dense(qweight, dtype), f"guarded {shape} {layout}")
            assert_dequantize_equals_reference(executor_ops, near, dtype, f"guarded {shape} {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("columns", [64, 63])
def test_special_blocks(cuda_ops, dtype, columns):
    """Denormal products, overflow of fp16, halves of the last place: all decided by fp32, then one rounding."""
    w = special_weight(columns)
    for scale_codebook in (None, "e4m3", "dynamic8"):
        packed, absmax = reference.quantize(w, DEFAULT.code, 64)
        qweight = cases.from_parts(packed, absmax, tuple(w.shape), Layout(64, "nf4", scale_codebook))
        assert_dequantize_equals_reference(cuda_ops, qweight, dtype, f"special, columns {columns}, {scale_codebook}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_scale(cuda_ops, value):
    qweight = cases.random_bytes(8, 100, Layout(scale_codebook=None))
    qweight.absmax[3] = value
    for dtype in DTYPES:
        assert_dequantize_equals_reference(cuda_ops, qweight, dtype, f"absmax {value} {dtype}")


def test_scale_is_not_contracted_to_fma(cuda_ops):
    qweight = cases.random_bytes(64, 4096)
    scale_code = qweight.scale_code[qweight.absmax.view(-1).long()]
    per_block = qweight.scale_absmax.repeat_interleave(256)[: scale_code.numel()]
    fused = (scale_code.double() * per_block.double() + qweight.scale_offset.double()).float()
    assert (fused != scale_code * per_block + qweight.scale_offset).sum() > 100, "the inputs no longer tell"
    assert_dequantize_equals_reference(cuda_ops, qweight, torch.float32, "fma")


def test_offset_views_of_one_buffer(cuda_ops):
    """Slices that start at an odd address, as safetensors gives them."""
    qweight = cases.random_bytes(16, 96, Layout(32))
    moved = {}
    for name in ("packed", "absmax", "scale_absmax", "code", "scale_code"):
        tensor = getattr(qweight, name)
        buffer = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype, device=cuda_ops.device)
        buffer[3:] = tensor.view(-1)
        moved[name] = buffer[3:].view(tensor.shape)
    moved["scale_offset"] = qweight.scale_offset.to(cuda_ops.device)
    arguments = cases.with_tensors(qweight, **moved).op_args()
    got = cuda_ops.ops.dequantize(*arguments, 0, 16, 0, 96, torch.float32)
    assert_same_bits(got.cpu(), cases.dense(qweight), "offset")


@pytest.mark.parametrize("K", [2**16, 2**16 + 1, 2**16 + 8])
def test_indices_past_2_to_the_32(executor_ops, K):
    """The last row and two columns of a weight most of which is never touched."""
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
    shared = (near.scale_offset, near.code, near.scale_code, N, K, 64)
    for dtype in (torch.float32, torch.bfloat16):
        row = executor_ops.ops.dequantize(packed, absmax, scale_absmax, *shared, N - 1, N, 0, K, dtype)
        assert_same_bits(row, expected[-K:].to(dtype).view(1, -1), f"last row of {N} x {K}")
        part = executor_ops.ops.dequantize(packed, absmax, scale_absmax, *shared, N - 3, N, K - 9, K - 1, dtype)
        assert_same_bits(part, expected[-3 * K :].view(3, K)[:, -9:-1].to(dtype), f"columns of {N} x {K}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_of_out_that_are_not_aligned_as_the_first(cuda_ops, dtype):
    qweight = cases.random_bytes(5, 64)
    out = torch.zeros(5, 67, dtype=dtype, device=cuda_ops.device)[:, :64]
    assert out.data_ptr() % 16 == 0
    cuda_ops.ops.dequantize_out(*cuda_ops.move(qweight.op_args()), 0, 5, 0, 64, out)
    assert_same_bits(out.cpu(), cases.dense(qweight, dtype), f"stride of 67 {dtype}")
