"""linear in Triton: every configuration forced in turn, under Triton's interpreter and on a GPU, to the CPU's bound."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, LAYOUTS, Layout, dtype_id, shape_id
from support.guarded import untouched
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased
from test_linear_cuda import ODD_SHAPES, linear

import nf4kernels

HALVES = (torch.bfloat16, torch.float16)
PATHS = ("fused", "dequantize_gemm")
# (N, K) of whole blocks, around the tiles: 64 rows of W and blocks of 64; then blocks of 32.
SHAPES = ((1, 64), (65, 128), (100, 576), (33, 96))


def assert_within_bound(triton_ops, x, qweight, what, bias=None):
    y = linear(triton_ops, x, qweight, bias)
    assert_product_within_bound(y, x, cases.dense(qweight).T, f"linear {what}", bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_bucket_and_shape(triton_ops, shape, path):
    N, K = shape
    qweight, bias = cases.quantized(N, K), torch.randn(N).bfloat16()
    for M, config in triton_ops.buckets("linear"):
        with triton_ops.running(path, config):
            x = cases.activations(M + 1, K, torch.bfloat16, 1.0)
            assert_within_bound(triton_ops, x, qweight, f"{path} {config}", bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_odd_shapes(triton_ops, dtype):
    for N, K in ODD_SHAPES:
        qweight = cases.quantized(N, K)
        for M in (1, 17) if K % 2 else (66,):
            x = cases.activations(M, K, dtype)
            assert_within_bound(triton_ops, x, qweight, f"{N}x{K} M={M}", torch.randn(N).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_layout(triton_ops, dtype):
    for i, layout in enumerate(LAYOUTS):
        N, K = ((37, 320), (64, 192), (20, 4096))[i % 3]
        x = cases.activations(3, K, dtype)
        assert_within_bound(triton_ops, x, cases.quantized(N, K, layout), f"{layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("codebook", ["nf4", "custom"])
def test_long_contraction_and_x_with_a_mean(triton_ops, codebook, dtype):
    """Splits of K in bf16 and fp16, runs of 512 terms in fp32; and the rounding of Ŵ is not biased."""
    qweight = cases.quantized(64, 4096, Layout(64, codebook))
    x = cases.activations(3, 4096, dtype, 1.0)
    assert_within_bound(triton_ops, x, qweight, codebook, torch.randn(64).to(dtype))
    assert_unbiased(linear(triton_ops, x, qweight), x, cases.dense(qweight).T, codebook)


@pytest.mark.parametrize("path", PATHS)
def test_scales_far_apart(triton_ops, path):
    for qweight in (cases.uneven(40, 512), cases.uneven(40, 512, zeros=False)):
        for dtype in HALVES:
            with triton_ops.running(path):
                assert_within_bound(triton_ops, cases.activations(9, 512, dtype), qweight, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_low_rank_term(triton_ops, rank, path, dtype):
    """Also where K is split: the term is in the first part alone."""
    if dtype == torch.float32 and path == "dequantize_gemm":
        x, weight = cases.activations(3, 64, dtype), cases.quantized(8, 64)
        with triton_ops.running(path), pytest.raises(RuntimeError, match="fp32 is multiplied in true fp32"):
            linear(triton_ops, x, weight)
        return
    for N, K in ((72, 192), (24, 2048 + 64), (10, 65)):
        qweight, scaling = cases.quantized(N, K), 2.5
        B, bias = (torch.randn(N, rank) / rank).to(dtype), torch.randn(N).to(dtype)
        x, P = cases.activations(4, K, dtype), cases.activations(4, rank, dtype, seed=1)
        with triton_ops.running(path):
            y = linear(triton_ops, x, qweight, bias, P, B, scaling)
        both, matrix = torch.cat([x, P], 1), torch.cat([cases.dense(qweight).T, scaling * B.float().T])
        assert_product_within_bound(y, both, matrix, f"linear {path} {N}x{K} rank {rank}", bias)


def test_splits_do_not_depend_on_more_than_m_and_k(triton_ops):
    """So that the size of a device changes no bits."""
    choose = triton_ops.backend.choose
    choices = {M: choose.choose("linear", M, 4096, 64, torch.bfloat16, torch.device("cpu")) for M in (1, 4, 16, 64)}
    assert [choice.config.depth for choice in choices.values()] == sorted(c.config.depth for c in choices.values())
    assert len({choice.config.depth for choice in choices.values()}) > 1


def test_same_bits_again(triton_ops):
    qweight, x = cases.quantized(70, 2112), cases.activations(3, 2112, torch.bfloat16)
    for path in PATHS:
        with triton_ops.running(path):
            assert_same_bits(linear(triton_ops, x, qweight), linear(triton_ops, x, qweight), path)


@pytest.mark.parametrize("K", [192, 65])
@pytest.mark.parametrize("path", PATHS)
def test_a_row_depends_on_no_other(triton_ops, path, K):
    """Neither on NaN in another row of x, nor a column of y on a NaN scale in another row of W."""
    qweight = cases.quantized(40, K, Layout(scale_codebook=None))
    x = cases.activations(9, K, torch.bfloat16)
    with triton_ops.running(path):
        clean = linear(triton_ops, x, qweight)
        x[4] = torch.nan
        y = linear(triton_ops, x, qweight)
        assert y[4].isnan().all()
        keep = torch.arange(9) != 4
        assert_same_bits(y[keep], clean[keep], "other rows")
        x[4] = 0
        absmax = qweight.absmax.clone()
        absmax.view(-1)[(33 * K + K // 2) // 64] = torch.nan
        y = linear(triton_ops, x, cases.with_tensors(qweight, absmax=absmax))
    struck = cases.dense(cases.with_tensors(qweight, absmax=absmax)).isnan().any(1)
    assert struck[33]
    assert y[:, struck].isnan().all()
    assert_same_bits(y[keep][:, ~struck], clean[keep][:, ~struck], "other columns")


def test_x_of_any_strides_and_leading_dimensions(triton_ops):
    qweight = cases.quantized(48, 128)
    x = cases.activations(6, 128, torch.bfloat16)
    expected = linear(triton_ops, x, qweight)
    buffer = torch.zeros(6 * 128 + 1, dtype=x.dtype)
    for other in (x.T.contiguous().T, x.repeat(1, 2)[:, :128], buffer[1:].view(6, 128).copy_(x)):
        assert_same_bits(linear(triton_ops, other, qweight), expected, "strides")
    assert_same_bits(linear(triton_ops, x.view(2, 3, 128), qweight), expected.view(2, 3, 48), "leading dimensions")
    assert linear(triton_ops, x[0], qweight).shape == (48,)


def test_empty(triton_ops):
    for N, K in ((0, 64), (5, 0), (0, 0), (5, 64)):
        for M in (0, 3):
            x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
            for path in PATHS:
                with triton_ops.running(path):
                    y = linear(triton_ops, x, cases.quantized(N, K), bias)
                assert y.shape == (M, N)
                if K == 0:
                    assert torch.equal(y, bias.expand(M, N))


def test_slices_reuse_memory_smaller_than_the_weight(triton_ops, monkeypatch):
    module = triton_ops.backend.linear.__globals__["multiply_by_slices"].__globals__
    monkeypatch.setitem(module, "SLICE_BYTES", 128 * 128 * 2)
    sizes, launch = [], module["launch"]

    def recorded(weight, row, column, out):
        sizes.append((row, out.shape[0], out.untyped_storage().data_ptr()))
        launch(weight, row, column, out)

    monkeypatch.setitem(module, "launch", recorded)
    qweight, x = cases.quantized(300, 128), cases.activations(5, 128, torch.bfloat16)
    with triton_ops.running("dequantize_gemm"):
        assert_within_bound(triton_ops, x, qweight, "slices", torch.randn(300).bfloat16())
    assert [size[:2] for size in sizes] == [(0, 128), (128, 128), (256, 44)]
    assert len({size[2] for size in sizes}) == 1


def test_the_public_function_takes_the_same_weights(triton_ops):
    """Against the package's own op on the CPU, whatever runs it."""
    qweight, x = cases.quantized(64, 128), cases.activations(3, 128, torch.float32)
    torch.testing.assert_close(linear(triton_ops, x, qweight), nf4kernels.linear(x, qweight), rtol=1e-5, atol=1e-5)


def test_indices_past_2_to_the_32(interpreter):
    """The last rows of W, and the last rows of x, of problems most of which is never touched."""
    from support.triton_interpreter import only_program

    torch.use_deterministic_algorithms(False)  # its poison would touch all of the output
    N, K, config = 2**20, 4096, interpreter.backend.choose.Config(16, 64, 4, 3, 8192)
    near = cases.quantized(64, K, Layout(scale_codebook=None))
    packed, absmax = untouched(N * K // 2, torch.uint8), untouched(N * K // 64, torch.float32)
    packed.view(N, -1)[-64:], absmax.view(N, -1)[-64:] = near.packed, near.absmax
    x = cases.activations(2, K, torch.bfloat16)
    with only_program(N // 64 - 1), interpreter.running("fused", config):
        y = interpreter.ops.linear(x, packed, absmax, None, None, near.code, None, N, K, 64, None)
    assert_product_within_bound(y[:, -64:], x, cases.dense(near).T, "far rows of W")

    M = 2**20 + 2
    many = untouched(M * K, torch.bfloat16).view(M, K)
    many[-2:] = x
    with only_program(M // 16), interpreter.running("fused", config):
        y = interpreter.ops.linear(many, *near.op_args(), None)
    assert_product_within_bound(y[-2:], x, cases.dense(near).T, "far rows of x")
