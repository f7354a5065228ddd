"""linear_dgrad: dx = dy @ Ŵ + s * Q @ A. What it shares with linear is in product.py."""

import pytest
import torch
from contract.product import ProductContract
from support import cases, ways
from support.cases import DTYPES, Layout, dtype_id, shape_id
from support.guarded import untouched
from support.numerics import assert_product_within_bound


class TestLinearDgrad(ProductContract):
    op, has_bias = "linear_dgrad", False

    def sizes(self, N, K):
        return N, K

    def matrix(self, qweight):
        return cases.dense(qweight)

    def arguments(self, a, qweight, lora=None, bias=None):
        return a, *qweight.op_args(), *(lora or (None, None, 1.0))

    @pytest.mark.ways("cpu")
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("shape", [(64, 16384 + 64), (33000, 40), (5, 40000 - 1)], ids=shape_id)
    def test_very_long_rows(self, way, shape, dtype):
        for block_size in (64, 4096):
            qweight = cases.quantized(*shape, Layout(block_size))
            for M in (1, 5):
                self.assert_right(way, self.inputs(qweight, M, dtype, 1.0), qweight, f"{block_size} M={M}")

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_is_the_transpose_of_linear(self, way, dtype):
        """<linear(x), dy> = <x, dgrad(dy)> up to rounding: forward and backward see one weight."""
        qweight = cases.random_bytes(50, 130)
        x, dy = cases.activations(9, 130, dtype), cases.activations(9, 50, dtype, seed=1)
        forward = (way.run("linear", x, *qweight.op_args(), None).double() * dy.double()).sum()
        backward = (x.double() * self.run(way, dy, qweight).double()).sum()
        magnitude = (x.double().abs() @ cases.dense(qweight).double().abs().T * dy.double().abs()).sum()
        # Per term: the output's rounding and at most two of the weight, on either side; the sums in fp32 are below.
        assert (forward - backward).abs() <= 3 * torch.finfo(dtype).eps * magnitude

    @pytest.mark.ways("executor")
    def test_splits_of_the_contraction(self, way):
        """More multiprocessors, more parts; every part and the way they are added up is deterministic."""
        assert self.splits(way, "tiled", cases.quantized(4096, 128), lambda run: run.grid[2]) == {2, 4, 8}

    @pytest.mark.ways("executor", "cuda")
    @pytest.mark.parametrize(
        ("N", "dtype", "kernel", "reason"),
        [
            (37, torch.bfloat16, "tiled", "N a multiple of 8"),
            (40, torch.bfloat16, "small", "the small kernel is linear's"),
            (40, torch.float32, ways.CUDA_DEQUANTIZE_GEMM, "true fp32"),
        ],
    )
    def test_a_forced_kernel_that_cannot_run_is_an_error(self, way, N, dtype, kernel, reason):
        with way.running(kernel), pytest.raises(RuntimeError, match=f"forced kernel {kernel} cannot run.*{reason}"):
            self.run(way, cases.activations(3, N, dtype), cases.quantized(N, 64))

    @pytest.mark.ways("interpreter")
    def test_indices_past_2_to_the_32(self, way):
        """The last column of tiles, over the last rows of a weight most of which is never touched."""
        from support.triton_interpreter import only_program

        torch.use_deterministic_algorithms(False)  # its poison would touch all of the output
        N, K = 48, 2**27 + 64
        near = cases.quantized(N, 64, Layout(scale_codebook=None))
        packed, absmax = untouched(N * K // 2, torch.uint8), untouched(N * K // 64, torch.float32)
        packed.view(N, -1)[:, -32:], absmax.view(N, -1)[:, -1:] = near.packed, near.absmax
        dy = cases.activations(2, N, torch.bfloat16)
        with only_program(K // 64 - 1), way.running("fused"):
            dx = way.ops.linear_dgrad(dy, packed, absmax, None, None, near.code, None, N, K, 64)
        assert_product_within_bound(dx[:, -64:], dy, cases.dense(near), "far columns")
