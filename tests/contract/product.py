"""What linear and its gradient have in common, stated once over every way to run either of them and every kernel.

Both multiply a [M, depth] by a matrix [depth, columns] that is made of Ŵ, and add LoRA's term:
y = x @ Ŵ.T + s * P @ B.T has the depth K, dx = dy @ Ŵ + s * Q @ A has the depth N. With LoRA's term either is one
product over a depth of depth + r, [a, lora_inner] @ [matrix, s * lora_factor], which is what the bound of
docs/design.md, section 7, is taken of.
"""

import pytest
import torch
from executor.executor import SM_86_SHARED
from support import cases, ways
from support.cases import DTYPES, EMPTY_SHAPES, LAYOUTS, Layout, dtype_id, paired, shape_id
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits, assert_unbiased
from support.triton_backend import LaunchRecorder

CODEBOOKS = ("nf4", "fp4", "int4", "af4", "custom")
HALVES = (torch.bfloat16, torch.float16)
RANKS = (1, 3, 8, 16, 17, 40, 64)
SCALING = 1.75


def joined(a, matrix, lora):
    """The product over depth + r that both terms make together."""
    inner, factor, scaling = lora
    return torch.cat([a, inner], 1), torch.cat([matrix, scaling * factor.float()], 0)


class ProductContract:
    """The properties of `op`; test_linear.py and test_linear_dgrad.py each add what it alone has."""

    op: str
    has_bias: bool

    def sizes(self, N, K):
        """(depth, columns)"""
        raise NotImplementedError

    def matrix(self, qweight):
        """[depth, columns] in fp32, by the reference."""
        raise NotImplementedError

    def arguments(self, a, qweight, lora=None, bias=None):
        """The op's; lora is (lora_inner [M, r], lora_factor [r, columns], scaling)."""
        raise NotImplementedError

    def run(self, way, a, qweight, lora=None, bias=None):
        return way.run(self.op, *self.arguments(a, qweight, lora, bias))

    def inputs(self, qweight, M, dtype, mean=0.0):
        return cases.activations(M, self.sizes(*qweight.shape)[0], dtype, mean)

    def lora(self, qweight, M, r, dtype, mean=0.0, scaling=SCALING):
        columns = self.sizes(*qweight.shape)[1]
        inner = cases.activations(M, r, dtype, mean, seed=3)
        return inner, cases.activations(r, columns, dtype, seed=4), scaling

    def assert_right(self, way, a, qweight, what, lora=None, bias=None):
        """Within the bound; returns the result."""
        result = self.run(way, a, qweight, lora, bias)
        product = (a, self.matrix(qweight)) if lora is None else joined(a, self.matrix(qweight), lora)
        assert_product_within_bound(result, *product, f"{self.op} {way} {what}", bias)
        return result

    # The bound.

    @pytest.mark.every_kernel
    def test_every_shape(self, way):
        """Every kernel, around its tiles; without and with a bias, which comes with the other mean."""
        for shape in way.fitting(self.op, *way.shapes(self.op)):
            qweight = cases.quantized(*shape)
            for dtype in HALVES[:1] if way.name == "interpreter" else way.dtypes(self.op):
                bias = torch.randn(shape[0]).to(dtype) if self.has_bias else None
                for M in way.rows(self.op):
                    self.assert_right(way, self.inputs(qweight, M, dtype, 1.0), qweight, f"M={M}")
                    if self.has_bias or way.is_compiled:
                        self.assert_right(way, self.inputs(qweight, M, dtype), qweight, f"M={M} bias", bias=bias)
        way.assert_ran(self.op)

    @pytest.mark.ways("executor", "cuda", "interpreter", "triton")
    def test_shapes_without_a_kernel_of_tensor_cores(self, way):
        """By the kernel that is chosen: odd K and N, blocks that straddle rows, fp32."""
        for shape in way.shapes(self.op):
            qweight = cases.quantized(*shape)
            for dtype in (torch.bfloat16, torch.float32) if way.name == "interpreter" else DTYPES:
                bias = torch.randn(shape[0]).to(dtype) if self.has_bias else None
                for M in way.rows(self.op):
                    if way.name != "interpreter" or (M < 66) == bool(shape[1] % 2):
                        self.assert_right(way, self.inputs(qweight, M, dtype), qweight, f"M={M}", bias=bias)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_every_layout(self, way, dtype):
        shapes = ((64, 96), (37, 100), (33, 65), (33, 192), (40, 4096))
        every_other = LAYOUTS[:: 3 if way.name == "interpreter" and dtype != torch.bfloat16 else 1]
        few = paired(((40, 320), (96, 256), (20, 4096)), every_other)
        pairs = way.pick([(s, layout) for layout in LAYOUTS for s in shapes], few)
        for shape, layout in pairs:
            qweight = cases.quantized(*shape, layout)
            for M in way.few_rows(self.op):
                self.assert_right(way, self.inputs(qweight, M, dtype), qweight, f"{layout} M={M}")

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("codebook", CODEBOOKS)
    def test_long_depth_and_a_mean(self, way, codebook):
        """A level rounded the same way everywhere adds up under a mean; a running sum over the depth loses bits."""
        if way.name == "interpreter" and codebook not in ("nf4", "custom"):
            pytest.skip("the interpreter: levels come from a table, and test_unbiased has the other codebooks")
        N, K = (64, 4096) if self.sizes(0, 1)[0] else (4096, 64)
        for scale_codebook in way.pick(("e4m3", None), ("e4m3",)):
            qweight = cases.quantized(N, K, Layout(64, codebook, scale_codebook))
            for dtype in way.dtypes(self.op):
                for mean in way.pick((0.0, 1.0, -1.0), (1.0,)):
                    for M in way.pick((1, 3, 16, 33), (16,)):
                        a = self.inputs(qweight, M, dtype, mean)
                        self.assert_right(way, a, qweight, f"{codebook} {scale_codebook} mean {mean} M={M}")

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("codebook", CODEBOOKS)
    def test_unbiased(self, way, codebook):
        if not way.is_compiled and codebook in ("fp4", "custom"):
            pytest.skip("a level is rounded up so often that the slope of all matrices is kept, not of this one")
        N, K = (512, 512) if way.is_compiled else (64, 4096) if self.sizes(0, 1)[0] else (4096, 64)
        qweight = cases.quantized(N, K, Layout(codebook=codebook))
        for dtype in HALVES:
            for M in way.pick((4, 64), (16,)):
                for mean in way.pick((0.0, 1.0), (1.0,)):
                    a = self.inputs(qweight, M, dtype, mean)
                    what = f"{self.op} {way} {codebook} M={M}"
                    assert_unbiased(self.run(way, a, qweight), a, self.matrix(qweight), what)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.ways("cpu")
    def test_many_rows(self, way, dtype):
        """A kernel takes so many rows at a time; the rest is another pass, with its own part of lora_inner."""
        for depth_or_columns in (97, 192):
            N, K = (70, depth_or_columns) if self.has_bias else (97, depth_or_columns - 27)
            qweight = cases.quantized(N, K)
            for M in (511, 512, 513, 1100):
                a, bias = self.inputs(qweight, M, dtype), torch.randn(N).to(dtype) if self.has_bias else None
                self.assert_right(way, a, qweight, f"M={M}", bias=bias)
                self.assert_right(way, a, qweight, f"M={M} lora", self.lora(qweight, M, 5, dtype), bias)

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "descending"])
    def test_scales_far_apart(self, way, zeros):
        for shape in way.pick(((40, 1088), (64, 1152), (37, 100), (1088, 64), (100, 37)), ((40, 512),)):
            qweight = cases.uneven(*shape, zeros)
            for dtype in way.dtypes(self.op):
                for mean in (0.0, 1.0):
                    for M in way.pick((1, 4, 7, 16, 33), (9,)):
                        self.assert_right(way, self.inputs(qweight, M, dtype, mean), qweight, f"M={M}")

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("codebook", ["nf4", "int4", "af4", "custom"])
    @pytest.mark.parametrize("scales", ["one", "clamped"])
    def test_blocks_that_share_a_scale(self, way, scales, codebook):
        """An error of the scale, or of its product with a level, is then the same all along the depth and adds up."""
        layout = Layout(64, codebook, None if scales == "one" else "e4m3")
        if scales == "one":
            qweight = cases.quantized(1024, 128, layout)
            qweight = cases.with_tensors(qweight, absmax=torch.full_like(qweight.absmax, 0.117))
        else:
            qweight = cases.quantized_from(cases.weight(1024, 128).clamp(-2, 2), layout)
        for mean in (0.0, 1.0):
            a = self.inputs(qweight, 16, torch.bfloat16, mean)
            self.assert_right(way, a, qweight, f"{codebook} {scales} mean {mean}")

    @pytest.mark.every_kernel
    def test_scales_beyond_fp16_of_weights_within(self, way):
        qweight = cases.quantized(64, 128, Layout(64, "custom", None))
        absmax = torch.full_like(qweight.absmax, 1e5)  # |Ŵ| up to 40,000
        qweight = cases.with_tensors(qweight, code=qweight.code / 2.5, absmax=absmax)
        self.assert_right(way, self.inputs(qweight, 5, torch.float16) * 2**-7, qweight, "")

    def test_more_codebooks_than_are_remembered(self, way):
        """A codebook's 16-bit levels are searched once and kept; two that begin alike are not taken for each other."""
        generator = torch.Generator().manual_seed(5)
        for i in range(12):
            code = torch.rand(16, generator=generator).mul(2).sub(1).sort().values
            code[:4] = torch.tensor([-1, -0.9, -0.8, -0.75])
            qweight = cases.with_tensors(cases.random_bytes(40, 128), code=code.sort().values, codebook="custom")
            self.assert_right(way, self.inputs(qweight, 7, torch.bfloat16, 1.0), qweight, f"codebook {i}")

    @pytest.mark.every_kernel
    def test_one_hot_input_reads_the_weight(self, way):
        """One 1 among zeros: each output is one element of Ŵ, within its own rounding: no sum hides it."""
        for shape in way.fitting(self.op, (40, 192), (37, 200)):
            for layout in (Layout(), Layout(32, "custom", None)):
                qweight = cases.random_bytes(*shape, layout)
                matrix = self.matrix(qweight).double()
                for dtype in way.dtypes(self.op):
                    for M in way.pick((1, 4, 17), way.few_rows(self.op)[:1]):
                        for i in sorted(
                            {i for i in way.pick((0, 1, 16, 31, 63, 64, 65, 127), (1, 31, 64)) if i < len(matrix)}
                            | {len(matrix) - 1}
                        ):
                            a = torch.zeros(M, len(matrix), dtype=dtype)
                            a[M - 1, i] = 1
                            y = self.run(way, a, qweight)
                            # One rounding of the output, and at most two of the weight (level and scale).
                            allowed = 1.5 * torch.finfo(dtype).eps * matrix[i].abs()
                            assert ((y[M - 1].double() - matrix[i]).abs() <= allowed).all(), (way, i, layout, dtype)
                            assert (y[: M - 1] == 0).all()

    def test_fp32_is_true_fp32(self, way):
        """bf16 or tf32 anywhere would be 100 times over this: 2^-20 of |a|·|Ŵ|, sums of at most 512 terms in fp32."""
        qweight = cases.quantized(*((64, 1024) if self.has_bias else (1024, 64)))
        matrix = self.matrix(qweight).double()
        for M in (1, 2, 16, 64):
            a = self.inputs(qweight, M, torch.float32)
            error = (self.run(way, a, qweight).double() - a.double() @ matrix).abs()
            assert (error <= 2.0**-20 * (a.double().abs() @ matrix.abs())).all()

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
    def test_accumulates_in_fp32(self, way, dtype):
        """Large terms that cancel: any partial sum rounded to 16 bits loses the small rest."""
        qweight = cases.quantized(*((16, 1024) if self.has_bias else (1024, 64)), Layout(scale_codebook=None))
        for tensor in (qweight.packed, qweight.absmax):
            halves = tensor.chunk(2, dim=1 if self.has_bias else 0)
            halves[1].copy_(halves[0])
        a = torch.zeros(3, 1024)
        a[:, :512] = cases.activations(3, 512, torch.float32) * 100
        a = a.to(dtype)
        a[:, 512:] = -a[:, :512]
        a[:, 1023] = a[:, 1023] + 1 if dtype == torch.float16 else 0
        self.assert_right(way, a, qweight, "cancels")

    @pytest.mark.ways("executor")
    @pytest.mark.every_kernel
    @pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
    def test_sums_that_truncate_as_a_tensor_core_does(self, way, dtype):
        """Eight products at a time, cut off where the largest one's bits end: a bias that the bound has room for."""
        if way.kernel not in ("small", "tiled"):
            pytest.skip("has no mma")
        way.executor.set(sums="truncated", shared_limit=SM_86_SHARED)
        for shape in ((64, 4096), (64, 192)) if self.has_bias else ((4096, 64), (192, 64)):
            qweight = cases.quantized(*shape)
            for mean in (0.0, 1.0):
                self.assert_right(way, self.inputs(qweight, 16, dtype, mean), qweight, f"mean {mean}")
            a, lora = self.inputs(qweight, 16, dtype), self.lora(qweight, 16, 16, dtype)
            self.assert_right(way, a, qweight, "lora", lora)

    # LoRA's term.

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("r", [*RANKS, 5, 700])
    def test_lora_of_every_rank(self, way, r):
        if r == 700 and not way.is_compiled:
            pytest.skip("many ranks are one loop that goes on, on the CPU alone")
        for shape in way.fitting(self.op, *way.pick(((50, 130), (72, 192)), ((72, 192), (10, 65)))):
            qweight = cases.quantized(*shape)
            for dtype in way.dtypes(self.op):
                bias = torch.randn(shape[0]).to(dtype) if self.has_bias else None
                for M in way.pick((1, 4, 6, 33), way.few_rows(self.op)):
                    a, lora = self.inputs(qweight, M, dtype), self.lora(qweight, M, r, dtype)
                    self.assert_right(way, a, qweight, f"M={M} r={r}", lora, bias)

    @pytest.mark.ways("cpu")
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_lora_of_every_shape(self, way, dtype):
        for shape in ((1, 1), (3, 5), (5, 63), (33, 65), (37, 100), (129, 31), (48, 320), (70, 96), (256, 512)):
            qweight = cases.quantized(*shape)
            for i, M in enumerate(way.rows(self.op)):
                for r in (RANKS[i % len(RANKS)], 16):
                    a, lora = self.inputs(qweight, M, dtype), self.lora(qweight, M, r, dtype)
                    self.assert_right(way, a, qweight, f"M={M} r={r}", lora)

    @pytest.mark.every_kernel
    def test_lora_with_a_mean_over_a_long_depth(self, way):
        """Also where the depth is split: the term is in one part alone."""
        for layout in way.pick(LAYOUTS[::3], LAYOUTS[:1]):
            for shape in way.pick(((4096, 64), (64, 4096)), ((24, 2112) if self.has_bias else (2088, 64),)):
                qweight = cases.quantized(*shape, layout)
                for M in way.pick((3, 16), (4,)):
                    a = self.inputs(qweight, M, torch.bfloat16, 1.0)
                    self.assert_right(way, a, qweight, f"{layout} M={M}", self.lora(qweight, M, 16, a.dtype, 1.0))

    @pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
    def test_lora_is_rounded_once_with_the_product(self, way, dtype):
        """Two large terms that cancel: either of them rounded to 16 bits on its own would lose what is left."""
        qweight = cases.quantized(64, 64, Layout(scale_codebook=None))
        qweight.absmax.fill_(1.0)
        exact = self.matrix(qweight)
        matrix = exact.to(dtype)
        for M in (3, 17):
            a = cases.activations(M, 64, dtype)
            actual = self.run(way, a, qweight, (a, -matrix, 1.0))  # r = 64: LoRA's term is minus the rounded product
            left = a.double() @ (exact.double() - matrix.double())
            # Where the kernel rounds Ŵ, by at most an eps each, that is all that differs.
            allowed = torch.finfo(dtype).eps * (a.double().abs() @ matrix.double().abs())
            assert ((actual.double() - left).abs() <= allowed + 2.0**-20).all()
            few = HALVES if M <= 16 else ()  # in whole numbers
            rounds = {
                "amx_bf16": few or HALVES[:1],
                "avx512_bf16": HALVES[:1],
                "neon_bf16": HALVES,
                "avx2": few,
                "avx512": few,
            }.get(way.name, ())
            if way.is_compiled and dtype not in rounds:
                assert (actual.double() - left).norm() <= 2.0**-7 * left.norm()

    @pytest.mark.every_kernel
    @pytest.mark.ways("executor", "cuda")
    def test_lora_that_cancels_the_product_of_an_exact_weight(self, way):
        """MXFP4's Ŵ is exact in bf16, so that the bound has room for the rounding of the sum alone."""
        qweight = cases.quantized_from(cases.weight(64, 64), Layout(32, "mxfp4", "e8m0"))
        matrix = self.matrix(qweight)
        assert torch.equal(matrix.bfloat16().float(), matrix)
        a = self.inputs(qweight, 9, torch.bfloat16)
        for share in (0.9, 0.98):
            self.assert_right(way, a, qweight, f"{share}", (a, (-share * matrix).bfloat16(), 1.0))

    @pytest.mark.parametrize("scaling", [0.0, 1.0, -0.3, 16.0])
    def test_scaling(self, way, scaling):
        qweight = cases.quantized(37, 100)
        for M in (2, 9):
            a, lora = self.inputs(qweight, M, torch.float32), self.lora(qweight, M, 4, torch.float32, scaling=scaling)
            actual = self.assert_right(way, a, qweight, f"scaling {scaling}", lora)
            if scaling == 0:
                assert_same_bits(actual, self.run(way, a, qweight), f"{self.op} {way} scaling 0")

    @pytest.mark.every_kernel
    def test_lora_that_leaves_no_room_for_its_scaling(self, way):
        """fp16: lora_inner of a scaled loss near the dtype's end, times 64, times a factor that brings it back."""
        qweight = cases.quantized(40, 128)
        for M in way.few_rows(self.op):
            inner, factor, _ = self.lora(qweight, M, 8, torch.float16)
            self.assert_right(
                way, self.inputs(qweight, M, torch.float16), qweight, "", (3000 * inner, 1e-3 * factor, 64.0)
            )

    def test_a_factor_of_zeros_changes_no_bit(self, way):
        """A fresh adapter, and rank 0."""
        qweight = cases.quantized(48, 320)
        for dtype in DTYPES:
            for M in way.pick((0, 1, 4, 5, 33), (0, 1, 33)):
                a = self.inputs(qweight, M, dtype)
                plain = self.run(way, a, qweight)
                for r in (0, 1, 16):
                    inner, factor, _ = self.lora(qweight, M, r, dtype)
                    zeros = inner, torch.zeros_like(factor), SCALING
                    assert_same_bits(self.run(way, a, qweight, zeros), plain, f"{self.op} {way} M={M} r={r}")

    @pytest.mark.every_kernel
    def test_a_nan_in_the_factor_reaches_its_column_only(self, way):
        for shape in way.fitting(self.op, (48, 320), (37, 101)):
            qweight = cases.quantized(*shape)
            columns = self.sizes(*shape)[1]
            for dtype in way.dtypes(self.op):
                for M in way.few_rows(self.op)[: None if way.is_compiled else 1]:
                    a, (inner, factor, scaling) = self.inputs(qweight, M, dtype), self.lora(qweight, M, 5, dtype)
                    for column in way.pick((0, 1, 30, columns - 1), (1, columns - 1)):
                        poisoned = factor.clone()
                        poisoned[3, column] = torch.nan
                        y = self.run(way, a, qweight, (inner, poisoned, scaling))
                        assert y[:, column].isnan().all()
                        assert y[:, torch.arange(columns) != column].isfinite().all(), (way, shape, M, column)

    # Who sees what.

    @pytest.mark.every_kernel
    def test_a_row_does_not_see_the_others(self, way):
        """The same M, the same row, other values around it: the same bits, also beside NaN and inf; with LoRA's too."""
        few = ((40, 192), (40, 65)) if way.kernel else ((40, 192),)
        for shape in way.fitting(self.op, *way.pick(((48, 320), (320, 48), (33, 65)), few)):
            qweight = cases.quantized(*shape)
            for dtype in way.dtypes(self.op):
                for M in [M for M in way.pick((2, 3, 4, 7, 13, 17, 64), way.few_rows(self.op)) if M > 1]:
                    a, lora = self.inputs(qweight, M, dtype), self.lora(qweight, M, 5, dtype)
                    plain, both = self.run(way, a, qweight), self.run(way, a, qweight, lora)
                    for row in sorted(way.pick((0, M // 2, M - 1), (M // 2,))):
                        for value in way.pick((torch.nan, torch.inf, 0.0, 1e4), (torch.nan, 0.0)):
                            what = f"{self.op} {way} M={M} row {row} beside {value}"
                            other, inner = torch.full_like(a, value), torch.full_like(lora[0], value)
                            other[row], inner[row] = a[row], lora[0][row]
                            assert_same_bits(self.run(way, other, qweight)[row], plain[row], what)
                            beside = self.run(way, a, qweight, (inner, *lora[1:]))
                            assert_same_bits(beside[row], both[row], f"{what} in LoRA's")
                            if value in (torch.inf,) or value != value:
                                assert not beside[torch.arange(M) != row].isfinite().any()

    @pytest.mark.every_kernel
    def test_nan_and_inf_reach_their_row(self, way):
        qweight = cases.quantized(48, 320)
        for dtype in way.dtypes(self.op):
            a = self.inputs(qweight, 5, dtype)
            a[2, 10], a[4, -1] = torch.nan, torch.inf
            y = self.run(way, a, qweight)
            assert y[2].isnan().all()
            assert not y[4].isfinite().any()
            assert y[[0, 1, 3]].isfinite().all()

    @pytest.mark.every_kernel
    def test_a_nan_block_reaches_its_columns_only(self, way):
        """What a block's weights are multiplied into becomes NaN; every other column keeps its bits."""
        for shape in way.fitting(self.op, *way.pick(((40, 320), (40, 100)), ((40, 192), (40, 65)))):
            qweight = cases.quantized(*shape, Layout(scale_codebook=None))
            absmax = qweight.absmax.clone()
            absmax.view(-1)[7] = torch.nan
            struck = cases.with_tensors(qweight, absmax=absmax)
            hit = self.matrix(struck).isnan().any(0)
            assert 0 < hit.sum() < len(hit)
            for dtype in way.dtypes(self.op):
                for M in way.few_rows(self.op):
                    a = self.inputs(qweight, M, dtype)
                    y = self.run(way, a, struck)
                    assert y[:, hit].isnan().all()
                    assert_same_bits(y[:, ~hit], self.run(way, a, qweight)[:, ~hit], f"{self.op} {way} M={M}")

    def test_a_level_that_is_nan_is_only_seen_where_it_is_used(self, way):
        # Level 0 is what kernels pad codes with. Triton's linear_dgrad pads rows of W so and multiplies them by zero: a
        # mask would cost 2 to 3 instructions a weight, of 13.5.
        pads = self.op == "linear_dgrad" and hasattr(way, "backend")
        for K, level in ((128, 3),) if pads else ((128, 3), (64, 0)):
            qweight = cases.quantized(40, K, Layout(scale_codebook=None))
            packed, code = qweight.packed.clone(), qweight.code.clone()
            packed[(packed & 15) == level] += 1
            packed[(packed >> 4) == level] += 16
            code[level] = torch.nan
            for M in (1, 8):
                a = self.inputs(qweight, M, torch.bfloat16)
                assert self.run(way, a, cases.with_tensors(qweight, packed=packed, code=code)).isfinite().all()

    def test_a_level_that_is_nan_leaves_no_finite_number_where_it_is_used(self, way):
        qweight = cases.quantized(40, 128, Layout(scale_codebook=None))
        code = qweight.code.clone()
        code[3] = torch.nan
        struck = cases.with_tensors(qweight, code=code)
        hit = self.matrix(struck).isnan().any(0)
        assert hit.any()
        for M in (1, 8):
            assert self.run(way, self.inputs(qweight, M, torch.bfloat16), struck)[:, hit].isnan().all()

    # Determinism.

    def bits_under_every_schedule(self, way, a, qweight, lora, what):
        """Run after run, for any number of threads and in any order of them: the bits of the first, which is right."""
        first = self.assert_right(way, a, qweight, what, lora)
        for schedule in way.schedules():
            again = self.run(way, a, qweight, lora)
            assert_same_bits(again, first, f"{self.op} {way} {what}, {schedule}")

    @pytest.mark.every_kernel
    def test_bits_depend_on_no_schedule(self, way):
        """Without LoRA's term and with it."""
        if way.kernel == "tiled":
            pytest.skip(f"{way}: the next test has shapes for its stages")
        for shape in way.fitting(self.op, *way.pick(((256, 512), (37, 100), (33, 65)), ((104, 320),))):
            qweight = cases.quantized(*shape)
            for dtype in way.pick(way.dtypes(self.op), HALVES[:1]):
                for M in way.pick((1, 2, 5, 16, 33, 129), way.rows(self.op)[-1:]):
                    a, lora = self.inputs(qweight, M, dtype), self.lora(qweight, M, 16, dtype)
                    for term in (None, lora):
                        self.bits_under_every_schedule(way, a, qweight, term, f"M={M}")

    @pytest.mark.ways("cpu")
    def test_bits_depend_on_no_schedule_where_threads_share_rows(self, way):
        """Of 512 rows, and of the rest; without LoRA's term and with it."""
        qweight = cases.quantized(70, 100)
        a, lora = self.inputs(qweight, 700, torch.bfloat16), self.lora(qweight, 700, 16, torch.bfloat16)
        for term in (None, lora):
            self.bits_under_every_schedule(way, a, qweight, term, "M=700")

    @pytest.mark.ways("executor", "cuda")
    def test_bits_depend_on_no_schedule_where_stages_are_filled_again(self, way):
        """Every tile, unsplit and split, in both forms of scales. A step's copies must wait for who reads the stage."""
        for reuse in way.reuses(self.op):
            qweight = cases.quantized(reuse.N, reuse.K, way.layout_of(reuse))
            a, lora = self.inputs(qweight, reuse.M, reuse.dtype), self.lora(qweight, reuse.M, 16, reuse.dtype)
            with way.running(*reuse.kernel):
                self.bits_under_every_schedule(way, a, qweight, lora if reuse.scales_sums else None, f"{reuse}")
        way.assert_stages_were_filled_again(self.op)

    @pytest.mark.every_kernel
    def test_inputs_that_require_a_gradient(self, way):
        """The op is not differentiable, and computes the same as without."""
        if hasattr(way, "backend") and way.kernel == ways.TRITON_DEQUANTIZE_GEMM:
            pytest.skip("torch refuses mm(out=) of what requires a gradient; autograd.Function never asks for it")
        qweight = cases.quantized(40, 64)
        for dtype in way.dtypes(self.op):
            a, (inner, factor, scaling) = self.inputs(qweight, 5, dtype), self.lora(qweight, 5, 8, dtype)
            expected = self.run(way, a, qweight, (inner, factor, scaling))
            lora = inner, factor.clone().requires_grad_(), scaling
            actual = self.run(way, a.clone().requires_grad_(), qweight, lora)
            assert_same_bits(actual.detach(), expected, f"{self.op} {way}")
            with torch.inference_mode():
                assert_same_bits(self.run(way, a, qweight, (inner, factor, scaling)), expected, "inference_mode")

    # Shapes and strides of the inputs.

    @pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
    @pytest.mark.every_kernel
    def test_empty(self, way, shape):
        if not way.takes(self.op, *shape) or (way.kernel in ("small", "tiled") and 0 in shape):
            pytest.skip(f"{way} has no kernel for nothing")
        qweight = cases.quantized(*shape)
        depth, columns = self.sizes(*shape)
        for dtype in way.dtypes(self.op):
            bias = torch.arange(shape[0]).to(dtype) if self.has_bias else None
            for M in (0, 1, 7):
                a, lora = torch.ones(M, depth, dtype=dtype), self.lora(qweight, M, 3, dtype)
                assert self.run(way, a, qweight).shape == (M, columns)
                assert self.run(way, a, qweight, lora).shape == (M, columns)
                if depth == 0:
                    assert torch.equal(self.run(way, a, qweight), torch.zeros(M, columns, dtype=dtype))
                    self.assert_right(way, a, qweight, f"M={M}", lora)
                if depth == 0 and self.has_bias:
                    assert torch.equal(self.run(way, a, qweight, bias=bias), bias.expand(M, columns))

    def test_no_rows(self, way):
        for shape in ((5, 64), (37, 100)):
            qweight = cases.quantized(*shape)
            assert self.run(way, self.inputs(qweight, 0, torch.bfloat16), qweight).shape == (0, self.sizes(*shape)[1])

    def test_leading_dimensions(self, way):
        shape = way.pick((37, 100), (48, 128))
        qweight = cases.quantized(*shape)
        depth, columns = self.sizes(*shape)
        for dtype in way.pick(DTYPES, HALVES[:1]):
            flat, (inner, factor, scaling) = self.inputs(qweight, 24, dtype), self.lora(qweight, 24, 3, dtype)
            plain = self.run(way, flat, qweight)
            both = self.run(way, flat, qweight, (inner, factor, scaling))
            for shape in ((2, 3, 4), (24, 1), (1, 24), (2, 1, 3, 4), (1, 1, 1, 24)):
                a = flat.view(*shape, depth)
                assert_same_bits(self.run(way, a, qweight), plain.view(*shape, columns), f"{shape}")
                for each in (inner, inner.view(*shape, 3)):  # with or without leading dimensions of its own
                    y = self.run(way, a, qweight, (each, factor, scaling))
                    assert_same_bits(y, both.view(*shape, columns), f"{shape} with LoRA")
            one = (
                self.run(way, flat[5:6], qweight)[0],
                self.run(way, flat[5:6], qweight, (inner[5:6], factor, scaling))[0],
            )
            assert_same_bits(self.run(way, flat[5], qweight), one[0], "no leading dimension")
            assert_same_bits(self.run(way, flat[5], qweight, (inner[5], factor, scaling)), one[1], "nor LoRA's")
            for shape in ((0,), (0, 3), (3, 0), (2, 0, 4)):
                assert self.run(way, torch.empty(*shape, depth, dtype=dtype), qweight).shape == (*shape, columns)

    def test_strided_input(self, way):
        """dy often comes expanded (from sum) or transposed (from attention)."""
        for shape in way.pick(((37, 100),), ((48, 128),)):
            qweight = cases.quantized(*shape)
            depth = self.sizes(*shape)[0]
            for dtype in way.pick(DTYPES, HALVES[:1]):
                base = cases.activations(40, 301, dtype)
                lora = {M: self.lora(qweight, M, 4, dtype) for M in (9, 20, 40)}
                for name, a in {
                    "columns": base[:, 1 : depth + 1],
                    "every-other-column": base[:, 1 : 2 * depth : 2],
                    "every-other-row": base[::2, 7 : depth + 7],
                    "column-major": base[:9, :depth].T.contiguous().T,
                    "expanded-row": base[:1, 3 : depth + 3].expand(9, depth),
                    "expanded-scalar": base[0, 0].expand(9, depth),
                }.items():
                    plain = a.clone(memory_format=torch.contiguous_format)
                    assert_same_bits(self.run(way, a, qweight), self.run(way, plain, qweight), f"{self.op} {name}")
                    both = self.run(way, plain, qweight, lora[len(a)])
                    assert_same_bits(self.run(way, a, qweight, lora[len(a)]), both, f"{self.op} {name} with LoRA")

    @pytest.mark.every_kernel
    def test_input_at_any_address(self, way):
        """The same bits where the kernel stays the same: the tensor cores' take pointers aligned to 16 bytes."""
        if way.is_reference or way.kernel in ("small", "tiled"):
            pytest.skip(f"{way}: an unaligned input takes another kernel, whose bits differ")
        qweight = cases.quantized(37, 100)
        depth = self.sizes(37, 100)[0]
        for dtype in way.dtypes(self.op):
            base = cases.activations(40, 301, dtype)
            for M in way.pick((1, 4, 9), (9,)):
                for start in way.pick((1, 2, 5), (1,)):
                    a = base.view(-1)[start : start + M * depth].view(M, depth)
                    what = f"{self.op} {way} M={M} offset {start}"
                    assert_same_bits(self.run(way, a, qweight), self.run(way, a.clone(), qweight), what)

    def test_inputs_are_not_written(self, way):
        qweight = cases.quantized(37, 100)
        for dtype in DTYPES:
            a, (inner, factor, scaling) = self.inputs(qweight, 17, dtype), self.lora(qweight, 17, 4, dtype)
            bias = torch.randn(37).to(dtype) if self.has_bias else None
            inputs = [t for t in (a, inner, factor, bias, *qweight.op_args()) if isinstance(t, torch.Tensor)]
            before = [t.clone() for t in inputs]
            self.run(way, a, qweight, (inner, factor, scaling), bias)
            for now, then in zip(inputs, before):
                assert torch.equal(now, then)

    @pytest.mark.ways("executor", "cuda", "interpreter", "triton")
    def test_a_kernel_of_another_name_is_refused(self, way):
        with pytest.raises(ValueError, match=r"any, small, tiled or .*, got fast|one of .*fused.*, got 'fast'"):
            way.running("fast").__enter__()

    # What one way alone has.

    @pytest.mark.ways("executor")
    @pytest.mark.every_kernel
    @pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
    def test_nothing_outside_of_a_tensor_is_read(self, way, at_end):
        """Inputs end (or begin) at a page that may not be touched; of the CPU's kernels test_memory.py says so."""
        bias = (torch.randn(64).bfloat16(),) if self.has_bias else ()
        for N, K in way.fitting(self.op, (40, 128), (33, 128), (64, 64), (7, 37)):
            qweight = cases.quantized(N, K)
            for M in way.few_rows(self.op):
                a, lora = self.inputs(qweight, M, torch.bfloat16), self.lora(qweight, M, 3, torch.bfloat16)
                tensors = self.arguments(a, qweight, lora, *(b[:N] for b in bias))
                # A pointer of the tensor cores' kernels is aligned to 16 bytes, which the end of a page is for these.
                multiple = 1 if way.kernel == "any" else 16
                fenced = [
                    guarded(t, at_end) if isinstance(t, torch.Tensor) and t.nbytes % multiple == 0 else t
                    for t in tensors
                ]
                assert_same_bits(way.run(self.op, *fenced), way.run(self.op, *tensors), f"{way} {M}x{N}x{K}")

    def splits(self, way, kernel, qweight, splits_of):
        """Into how many parts 1, 2 and 4 multiprocessors split the depth."""
        a, lora = self.inputs(qweight, 12, torch.bfloat16), self.lora(qweight, 12, 6, torch.bfloat16, scaling=1.0)
        bias, seen = torch.randn(qweight.shape[0]).bfloat16() if self.has_bias else None, set()
        for multiprocessors in (1, 2, 4):
            way.pretend(90, multiprocessors)
            way.executor.reset()
            with way.running(kernel):
                y = self.assert_right(way, a, qweight, f"{multiprocessors} multiprocessors", lora, bias)
                assert_same_bits(self.run(way, a, qweight, lora, bias), y, "again")
            (product,) = (run for run in way.launches() if "linear" in run.kernel)
            reduces = any("reduce" in run.kernel for run in way.launches())
            assert reduces == (kernel == "small" and splits_of(product) > 1), "tiled adds splits up in its own launch"
            seen.add(splits_of(product))
        return seen

    @pytest.mark.ways("interpreter")
    def test_no_run_of_a_sum_is_longer_than_512_terms(self, way, monkeypatch):
        """Terms of fp32, or steps of 16 terms of a tensor core: a longer depth has parts."""
        kernel, depth, function = LaunchRecorder(), 20000, getattr(way.ops, self.op)
        monkeypatch.setitem(function.__globals__, f"{self.op}_kernel", kernel)
        monkeypatch.setitem(function.__globals__, "reduce_splits", lambda *arguments: None)
        qweight = cases.random_bytes(*((8, depth) if self.has_bias else (depth, 8)))
        for M in (1, 16, 64):
            for dtype in DTYPES:
                function(*self.arguments(torch.zeros(M, depth, dtype=dtype), qweight))
                (_, splits), options = kernel.launches.pop()
                if dtype == torch.float32:
                    assert options["RUN"] == 512
                else:
                    assert splits * 512 * 16 >= depth

    @pytest.mark.ways("interpreter", "triton")
    def test_fp32_is_not_dequantized_first(self, way):
        qweight = cases.quantized(8, 64)
        with way.running(ways.TRITON_DEQUANTIZE_GEMM), pytest.raises(RuntimeError, match="fp32 is multiplied in true"):
            self.run(way, self.inputs(qweight, 3, torch.float32), qweight)
