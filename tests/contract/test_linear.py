"""linear: y = x @ Ŵ.T + s * P @ B.T + bias. What it shares with its gradient is in product.py."""

import math

import pytest
import torch
from contract.product import ProductContract
from support import cases, ways
from support.cases import DTYPES, HALVES, Layout, dtype_id
from support.guarded import untouched
from support.numerics import assert_product_within_bound, assert_same_bits

import nf4kernels


class TestLinear(ProductContract):
    op, has_bias = "linear", True

    def sizes(self, N, K):
        return K, N

    def matrix(self, qweight):
        return cases.dense(qweight).T

    def arguments(self, a, qweight, lora=None, bias=None):
        inner, factor, scaling = lora or (None, None, 1.0)
        return a, *qweight.op_args(), bias, inner, None if factor is None else factor.T.contiguous(), scaling

    @pytest.mark.ways("interpreter", "triton")
    def test_packed_bytes_at_any_address(self, way):
        """Words of 4 bytes are loaded: bytes that begin between them are copied first."""
        qweight = cases.quantized(40, 128)
        x, (packed, *rest) = self.inputs(qweight, 9, torch.bfloat16), qweight.op_args()
        moved = torch.cat([packed.new_zeros(1), packed.view(-1)])[1:].view_as(packed)
        assert moved.data_ptr() % 4
        assert_same_bits(way.run("linear", x, moved, *rest, None), way.run("linear", x, packed, *rest, None), f"{way}")

    @pytest.mark.ways("cpu")
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("K", [16384 + 64, 33000, 40000 - 1])
    def test_very_long_rows(self, way, K, dtype):
        """More than one slice of partial sums; blocks within a row, across rows, and rows that share bytes."""
        for block_size in (64, 4096):
            qweight = cases.quantized(35, K, Layout(block_size))
            for M in (1, 4, 5):
                self.assert_right(way, self.inputs(qweight, M, dtype, 1.0), qweight, f"{block_size} M={M}")

    def test_large_x_under_falling_scales(self, way):
        """A sum kept in units of the last block's scale overflows if the scales fall far: 2^-27 within four blocks."""
        qweight = cases.quantized(40, 256, Layout(scale_codebook=None))
        falling = 2.0 ** -(torch.arange(4) * 9.0).expand(40, 4)
        qweight = cases.with_tensors(qweight, absmax=qweight.absmax * falling)
        x = torch.zeros(8, 256)
        x[:, :64] = cases.activations(8, 64, torch.float32) * 1e30
        self.assert_right(way, x.bfloat16(), qweight, "")

    def test_outliers_among_small_x(self, way):
        """Where x is cut into whole numbers by the largest of 64, the others keep what the bound asks for."""
        qweight = cases.quantized(40, 256)
        for dtype in HALVES:
            for M in (1, 4, 16):
                x = cases.activations(M, 256, torch.float32)
                x[:, 5::64] *= 2.0**10
                self.assert_right(way, x.to(dtype), qweight, f"{dtype} M={M}")
                self.assert_right(way, (x * 2.0**-100).bfloat16(), qweight, f"small, M={M}")

    def test_infinite_x_gives_no_finite_number(self, way):
        qweight = cases.quantized(40, 256)
        for dtype in DTYPES:
            for M in (1, 3, 17):
                x = cases.activations(M, 256, dtype)
                expected = self.run(way, x, qweight)
                x[0, 70] = math.inf
                y = self.run(way, x, qweight)
                assert not y[0].isfinite().any()
                assert torch.equal(y[1:], expected[1:])

    @pytest.mark.ways("cpu")
    def test_which_products_are_in_whole_numbers(self, way):
        """There alone a row with inf is NaN throughout. Weights of 8, and x without another NaN's cause."""
        whole = {  # rows of x, by how many weights share a scale
            "avx2": {64: range(1, 17), 32: (), 16: ()},
            "avx512": dict.fromkeys((64, 32, 16), range(1, 17)),
            "amx_bf16": {64: range(1, 5), 32: range(1, 16), 16: range(1, 16)},
        }.get(way.name, dict.fromkeys((64, 32, 16), ()))
        for block_size, rows in whole.items():
            qweight = cases.quantized_from(torch.full((3, 192), 8.0), Layout(block_size))
            for dtype in DTYPES:
                for M in (1, 2, 3, 4, 5, 15, 16, 17):
                    x = torch.ones(M, 192, dtype=dtype)
                    x[-1, 70] = math.inf
                    last = self.run(way, x, qweight)[-1]
                    own = rows if dtype == torch.bfloat16 or way.name != "amx_bf16" else range(1, 17)
                    is_whole = dtype != torch.float32 and way.kernel != "dequantize_gemm" and M in own
                    assert (last.isnan() if is_whole else last == math.inf).all(), (block_size, dtype, M)

    def test_strided_bias(self, isa):
        """Of the public function."""
        qweight = cases.quantized(37, 100)
        x, bias, one = cases.activations(5, 100, torch.float32), torch.randn(37, 3), torch.randn(1)
        for strided in (bias[:, 1], one.expand(37)):
            expected = nf4kernels.linear(x, qweight, strided.contiguous())
            assert_same_bits(nf4kernels.linear(x, qweight, strided), expected, f"{isa} bias")

    def test_grad_mode_does_not_change_bits(self, isa):
        """Of the public function."""
        qweight = cases.quantized(48, 320)
        for dtype in DTYPES:
            for M in (1, 5, 33):
                x = cases.activations(M, 320, dtype)
                bias = torch.randn(48, dtype=dtype)
                plain = nf4kernels.linear(x, qweight, bias)
                with torch.no_grad():
                    assert_same_bits(nf4kernels.linear(x.requires_grad_(), qweight, bias), plain, "no_grad")
                with torch.inference_mode():
                    assert_same_bits(nf4kernels.linear(x, qweight, bias), plain, "inference_mode")
                with_gradients = nf4kernels.linear(x, qweight, bias.requires_grad_())
                assert_same_bits(with_gradients.detach(), plain, "with gradients")

    def test_the_public_function_takes_the_same_weights(self, way):
        """Against the package's own op on the CPU, whatever runs it."""
        qweight, x = cases.quantized(64, 128), cases.activations(3, 128, torch.float32)
        torch.testing.assert_close(self.run(way, x, qweight), nf4kernels.linear(x, qweight), rtol=1e-5, atol=1e-5)

    # The CUDA kernels.

    @pytest.mark.ways("executor")
    def test_the_choice_and_what_it_is_told(self, way):
        """fp32 and unaligned x go to kernels that take them; x of any strides is taken."""
        qweight = cases.quantized(48, 128)
        buffer = cases.activations(1, 9 * 128 + 8, torch.bfloat16)[0]
        for x, kernel in (
            (buffer[: 9 * 128].view(9, 128), "linear_small"),
            (buffer[1 : 1 + 9 * 128].view(9, 128), "product_any"),
            (cases.activations(128, 9, torch.bfloat16).T, "linear_small"),
            (cases.activations(9, 128, torch.float32), "product_any"),
            (cases.activations(40, 128, torch.bfloat16), "linear_tiled"),
            (cases.activations(400, 128, torch.bfloat16), "dequantize"),
        ):
            way.executor.reset()
            self.assert_right(way, x, qweight, kernel)
            assert any(kernel in run.kernel for run in way.launches()), (kernel, way.launches())

    @pytest.mark.ways("executor")
    def test_splits_of_the_contraction(self, way):
        """More multiprocessors, more parts; every part and the way they are added up is deterministic."""
        qweight = cases.quantized(40, 4096)
        seen = self.splits(way, "tiled", qweight, lambda run: run.grid[2])
        assert len(seen) == 3, seen

    @pytest.mark.ways("executor", "cuda")
    @pytest.mark.parametrize(
        ("kernel", "x", "layout", "reason"),
        [
            ("small", torch.randn(17, 64).bfloat16(), Layout(), "at most 16 rows"),
            ("tiled", torch.randn(3, 64), Layout(), "true fp32"),
            ("tiled", torch.randn(3, 96).bfloat16(), Layout(32), "K must be a multiple of 64"),
            ("small", torch.randn(3, 96).bfloat16(), Layout(), "K must be a multiple of 64"),
        ],
    )
    def test_a_forced_kernel_that_cannot_run_is_an_error(self, way, kernel, x, layout, reason):
        with way.running(kernel), pytest.raises(RuntimeError, match=f"forced kernel {kernel} cannot run.*{reason}"):
            self.run(way, x, cases.quantized(32, x.shape[1], layout))

    # The Triton kernels.

    @pytest.mark.ways("interpreter", "triton")
    def test_splits_do_not_depend_on_more_than_m_and_k(self, way):
        """So that the size of a device changes no bits."""
        choose, cpu = way.backend.choose, torch.device("cpu")
        choices = {M: choose.choose("linear", M, 4096, 64, torch.bfloat16, cpu) for M in (1, 4, 16, 64)}
        assert [choice.config.depth for choice in choices.values()] == sorted(c.config.depth for c in choices.values())
        assert len({choice.config.depth for choice in choices.values()}) > 1

    @pytest.mark.ways("interpreter", "triton")
    def test_slices_reuse_memory_smaller_than_the_weight(self, way, monkeypatch):
        module = way.backend.linear.__globals__["multiply_by_slices"].__globals__
        monkeypatch.setitem(module, "SLICE_BYTES", 128 * 128 * 2)
        sizes, launch = [], module["launch"]

        def recorded(weight, row, column, out):
            sizes.append((row, out.shape[0], out.untyped_storage().data_ptr()))
            launch(weight, row, column, out)

        monkeypatch.setitem(module, "launch", recorded)
        qweight, x = cases.quantized(300, 128), cases.activations(5, 128, torch.bfloat16)
        with way.running(ways.TRITON_DEQUANTIZE_GEMM):
            self.assert_right(way, x, qweight, "slices", bias=torch.randn(300).bfloat16())
        assert [size[:2] for size in sizes] == [(0, 128), (128, 128), (256, 44)]
        assert len({size[2] for size in sizes}) == 1

    @pytest.mark.ways("interpreter")
    def test_indices_past_2_to_the_32(self, way):
        """The last rows of W, and the last rows of x, of problems most of which is never touched."""
        from support.triton_interpreter import only_program

        torch.use_deterministic_algorithms(False)  # its poison would touch all of the output
        N, K, config = 2**20, 4096, way.backend.choose.Config(16, 64, 4, 3, 8192)
        near = cases.quantized(64, K, Layout(scale_codebook=None))
        packed, absmax = untouched(N * K // 2, torch.uint8), untouched(N * K // 64, torch.float32)
        packed.view(N, -1)[-64:], absmax.view(N, -1)[-64:] = near.packed, near.absmax
        x = cases.activations(2, K, torch.bfloat16)
        with only_program(N // 64 - 1), way.running("fused", config):
            y = way.ops.linear(x, packed, absmax, None, None, near.code, None, N, K, 64, None)
        assert_product_within_bound(y[:, -64:], x, cases.dense(near).T, "far rows of W")

        M = 2**20 + 2
        many = untouched(M * K, torch.bfloat16).view(M, K)
        many[-2:] = x
        with only_program(M // 16), way.running("fused", config):
            y = way.ops.linear(many, *near.op_args(), None)
        assert_product_within_bound(y[-2:], x, cases.dense(near).T, "far rows of x")
