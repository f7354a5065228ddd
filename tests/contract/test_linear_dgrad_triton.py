"""linear_dgrad in Triton: every configuration forced in turn, under Triton's interpreter and on a GPU."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, LAYOUTS, Layout, dtype_id, shape_id
from support.guarded import untouched
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased
from test_linear_cuda import ODD_SHAPES
from test_linear_dgrad_cuda import assert_within_bound, dgrad

HALVES = (torch.bfloat16, torch.float16)
PATHS = ("fused", "dequantize_gemm")
SHAPES = ((1, 64), (33, 128), (70, 320), (40, 96))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_bucket_and_shape(triton_ops, shape, path):
    qweight = cases.quantized(*shape)
    for M, config in triton_ops.buckets("linear_dgrad"):
        with triton_ops.running(path, config):
            dy = cases.activations(M + 1, shape[0], torch.bfloat16, 1.0)
            assert_within_bound(triton_ops, dy, qweight, f"{path} {config}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_odd_shapes(triton_ops, dtype):
    for shape in ODD_SHAPES:
        for M in (1, 17) if shape[1] % 2 else (66,):
            dy = cases.activations(M, shape[0], dtype)
            assert_within_bound(triton_ops, dy, cases.quantized(*shape), f"{shape} M={M}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_layout(triton_ops, dtype):
    for i, layout in enumerate(LAYOUTS):
        shape = ((40, 320), (70, 192), (20, 4096))[i % 3]
        dy = cases.activations(3, shape[0], dtype)
        assert_within_bound(triton_ops, dy, cases.quantized(*shape, layout), f"{layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_long_contraction_and_dy_with_a_mean(triton_ops, dtype):
    """Splits of N in bf16 and fp16, runs of 512 terms in fp32; and the rounding of Ŵ is not biased."""
    qweight = cases.quantized(4096, 64)
    dy = cases.activations(3, 4096, dtype, 1.0)
    assert_within_bound(triton_ops, dy, qweight, "long")
    assert_unbiased(dgrad(triton_ops, dy, qweight), dy, cases.dense(qweight), "long")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_low_rank_term(triton_ops, rank, path, dtype):
    """Also where N is split: the term is in the first part alone."""
    if dtype == torch.float32 and path == "dequantize_gemm":
        with triton_ops.running(path), pytest.raises(RuntimeError, match="fp32 is multiplied in true fp32"):
            dgrad(triton_ops, cases.activations(3, 8, dtype), cases.quantized(8, 64))
        return
    for N, K in ((72, 192), (2048 + 40, 64), (10, 65)):
        qweight, scaling = cases.quantized(N, K), 2.5
        A = (torch.randn(rank, K) / rank).to(dtype)
        dy, Q = cases.activations(4, N, dtype), cases.activations(4, rank, dtype, seed=1)
        with triton_ops.running(path):
            dx = dgrad(triton_ops, dy, qweight, Q, A, scaling)
        both, matrix = torch.cat([dy, Q], 1), torch.cat([cases.dense(qweight), scaling * A.float()])
        assert_product_within_bound(dx, both, matrix, f"dgrad {path} {N}x{K} rank {rank}")


@pytest.mark.parametrize("K", [128, 65])
@pytest.mark.parametrize("path", PATHS)
def test_a_row_depends_on_no_other(triton_ops, path, K):
    """Neither on NaN in another row of dY, nor a column of dX on a NaN scale in other columns of W."""
    qweight = cases.quantized(40, K, Layout(scale_codebook=None))
    dy = cases.activations(9, 40, torch.bfloat16)
    with triton_ops.running(path):
        clean = dgrad(triton_ops, dy, qweight)
        dy[4] = torch.nan
        dx = dgrad(triton_ops, dy, qweight)
        assert dx[4].isnan().all()
        keep = torch.arange(9) != 4
        assert_same_bits(dx[keep], clean[keep], "other rows")
        dy[4] = 0
        absmax = qweight.absmax.clone()
        absmax.view(-1)[-1] = torch.nan
        struck = cases.with_tensors(qweight, absmax=absmax)
        dx = dgrad(triton_ops, dy, struck)
    columns = cases.dense(struck).isnan().any(0)
    assert 0 < columns.sum() < K
    assert dx[:, columns].isnan().all()
    assert_same_bits(dx[keep][:, ~columns], clean[keep][:, ~columns], "other columns")


def test_dy_of_any_strides_and_leading_dimensions(triton_ops):
    qweight, dy = cases.quantized(48, 128), cases.activations(6, 48, torch.bfloat16)
    expected = dgrad(triton_ops, dy, qweight)
    for path in PATHS:
        with triton_ops.running(path):
            assert_same_bits(dgrad(triton_ops, dy, qweight), dgrad(triton_ops, dy, qweight), path)
    assert_same_bits(dgrad(triton_ops, dy.T.contiguous().T, qweight), expected, "strides")
    assert_same_bits(dgrad(triton_ops, dy.view(2, 3, 48), qweight), expected.view(2, 3, 128), "leading dimensions")
    assert dgrad(triton_ops, dy[0], qweight).shape == (128,)


def test_empty(triton_ops):
    for N, K in ((0, 64), (5, 0), (0, 0), (5, 64)):
        for M in (0, 3):
            for path in PATHS:
                with triton_ops.running(path):
                    dx = dgrad(triton_ops, torch.randn(M, N).bfloat16(), cases.quantized(N, K))
                assert dx.shape == (M, K)
                if N == 0:
                    assert not dx.any()


def test_indices_past_2_to_the_32(interpreter):
    """The last column of tiles, over the last rows of a weight most of which is never touched."""
    from support.triton_interpreter import only_program

    torch.use_deterministic_algorithms(False)  # its poison would touch all of the output
    N, K = 48, 2**27 + 64
    qweight = cases.quantized(N, 64, Layout(scale_codebook=None))
    packed, absmax = untouched(N * K // 2, torch.uint8), untouched(N * K // 64, torch.float32)
    packed.view(N, -1)[:, -32:], absmax.view(N, -1)[:, -1:] = qweight.packed, qweight.absmax
    dy = cases.activations(2, N, torch.bfloat16)
    with only_program(K // 64 - 1), interpreter.running("fused"):
        dx = interpreter.ops.linear_dgrad(dy, packed, absmax, None, None, qweight.code, None, N, K, 64)
    assert_product_within_bound(dx[:, -64:], dy, cases.dense(qweight), "far columns")
