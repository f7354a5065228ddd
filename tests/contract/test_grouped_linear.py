"""grouped_linear and its gradient: each expert's rows are its product's, whatever rows the others have."""

import contextlib
import importlib
import itertools

import pytest
import torch
from support import cases, ways
from support.cases import DTYPES, Layout, dtype_id, paired
from support.experts import LAYOUTS, assert_right, offsets_of, rows_of
from support.guarded import guarded, untouched
from support.numerics import assert_product_within_bound, assert_same_bits
from support.triton_backend import LaunchRecorder

from nf4kernels import quantize_experts
from nf4kernels.backends import native

# Rows of each expert: none at either end and between; all in one; one expert; a full tile, one row more, one less.
COUNTS = ((0, 3, 0, 17, 8, 0), (0, 0, 40), (9,), (16, 33, 15), (130, 0, 70), (0, 0))
# Also fewer and more than linear takes row by row on the CPU.
CPU_COUNTS = ((0, 3, 1, 0, 17, 4, 0), (5, 2, 64), (0, 0, 40), (33, 0, 0), (9,), (0,), (0, 0, 0), (1,) * 12)
BFLOAT16 = torch.bfloat16


class GroupedContract:
    """The properties of `op`, a [T, depth] times each expert's matrix [depth, columns]."""

    op: str
    plain: str  # the product of one expert
    is_dgrad: bool

    def sizes(self, N, K):
        """(depth, columns)"""
        return (N, K) if self.is_dgrad else (K, N)

    def inputs(self, T, qweights, dtype, mean=0.0):
        return cases.activations(T, self.sizes(*qweights.shape[1:])[0], dtype, mean)

    def run(self, way, a, counts, qweights):
        """`counts` are each expert's rows, or a tensor of offsets."""
        offsets = counts if isinstance(counts, torch.Tensor) else offsets_of(counts)
        return way.run(self.op, a, offsets, *qweights.op_args())

    def run_plain(self, way, a, qweight):
        return way.run(self.plain, a, *qweight.op_args(), *(() if self.is_dgrad else (None,)))

    def assert_right(self, way, a, counts, qweights, what):
        y = self.run(way, a, counts, qweights)
        assert y.shape == (len(a), self.sizes(*qweights.shape[1:])[1])
        assert_right(y, self.op, a, counts, qweights, f"{way} {what}")
        return y

    # The bound, and whose rows are whose.

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("counts", COUNTS, ids=str)
    def test_every_kernel(self, way, counts):
        """Also with rows of no expert after the last; in each configuration that there is."""
        shape = (136, 192) if way.name in ("executor", "cuda") else (72, 128)
        qweights = cases.quantized_experts(len(counts), *shape)
        for dtype, configuration in way.configurations(self.op):
            if way.name == "interpreter" and dtype != BFLOAT16:
                continue  # every_layout has them, of fewer rows
            with configuration:
                for unused in (5,) if way.name == "interpreter" else (0, 5):
                    a = self.inputs(sum(counts) + unused, qweights, dtype, 1.0)
                    self.assert_right(way, a, counts, qweights, f"{counts}")
        if sum(counts):
            way.assert_ran(self.op)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize(
        ("shape", "layout"), paired(((48, 256), (37, 512), (300, 256), (96, 512), (65, 256)), LAYOUTS), ids=str
    )
    def test_every_layout(self, way, shape, layout, dtype):
        """By the kernel that is chosen; 300 x 256 are 5 superblocks an expert, the last one short."""
        if way.name == "interpreter" and dtype == torch.float16:
            pytest.skip("the interpreter: fp16 is one kernel with bf16")
        for counts in way.pick(CPU_COUNTS, ((3, 0, 20),)):
            qweights = cases.quantized_experts(len(counts), *shape, layout)
            a = self.inputs(sum(counts) + 2, qweights, dtype)
            self.assert_right(way, a, counts, qweights, f"{layout} {counts}")

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("mean", [0.0, 1.0])
    def test_a_long_depth_and_a_mean(self, way, mean, dtype):
        """More than one run of 512 terms of fp32, or of 512 steps of a tensor core, the last one short."""
        if way.name == "interpreter" and mean == 0 and dtype != torch.float32:
            pytest.skip("the interpreter: a mean finds what its absence would, and 8256 steps are seconds there")
        long = way.pick(8256, 1024 + 64 if dtype == torch.float32 else 8192 + 64 if way.name != "executor" else 4096)
        for layout in way.pick((Layout(), Layout(64, "custom")), (Layout(),)):
            qweights = cases.quantized_experts(2, *((long, 64) if self.is_dgrad else (64, long)), layout)
            self.assert_right(way, self.inputs(5, qweights, dtype, mean), (2, 3), qweights, f"mean {mean}")

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("codebook", ["nf4", "custom"])
    @pytest.mark.ways("executor", "cuda")
    def test_a_mean_by_every_kernel(self, way, codebook):
        shape = (4096, 64) if self.is_dgrad else (64, 4096)
        qweights = cases.quantized_experts(2, *shape, Layout(64, codebook))
        self.assert_right(way, self.inputs(16, qweights, BFLOAT16, 1.0), (9, 7), qweights, codebook)

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("E", [1, 31, 32, 33, 65, 200])
    def test_many_experts(self, way, E):
        """As many as a warp has lanes, and more; the last has rows and so has every ninth."""
        if way.name == "interpreter" and E == 200:
            pytest.skip("the interpreter: 65 experts are more than a power of two already")
        counts = [1 + e % 4 if e % 9 == 0 or e == E - 1 else 0 for e in range(E)]
        qweights = cases.quantized_experts(E, 24, 64)
        self.assert_right(way, self.inputs(sum(counts) + 2, qweights, BFLOAT16), counts, qweights, f"of {E}")

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.ways("cpu", "executor", "cuda")
    def test_any_rows(self, way, seed):
        """Drawn: many experts without rows, a few with most of them."""
        generator = torch.Generator().manual_seed(seed)
        counts = (torch.rand(10, generator=generator).pow(6) * 60).int().tolist()
        qweights = cases.quantized_experts(10, 40, 128)
        self.assert_right(way, self.inputs(sum(counts) + seed % 3, qweights, BFLOAT16), counts, qweights, f"{counts}")

    @pytest.mark.every_kernel
    def test_the_bits_of_the_product_of_each_expert(self, way):
        """Where the same tile runs for both, each in turn, and neither splits the depth."""
        if way.kernel == ways.CUDA_DEQUANTIZE_GEMM and not way.is_compiled:
            pytest.skip(f"{way}: a product of experts and one of a weight are two of a library's kernels")
        if way.name in ("executor", "cuda"):
            way.pretend(90, 1)
        by_kernel = {
            "small": ((3, 0, 8, 16),), "any": ((70, 1),),
            "tiled": ((5, 0, 40, 130),),
        }  # fmt: skip
        for counts in by_kernel.get(way.kernel, way.pick(CPU_COUNTS, ((20, 0, 1, 40),))):
            for shape, layout in paired(
                way.pick(((48, 256), (37, 512), (300, 256)), ((136, 192),)), way.pick(LAYOUTS, LAYOUTS[:1])
            ):
                qweights = cases.quantized_experts(len(counts), *shape, layout)
                configurations = way.configurations(self.op)
                if way.kernel == "tiled":
                    tiles = range(len(native.cuda_tiles(way.library, self.op)))
                    configurations = ((BFLOAT16, way.running("tiled", tile, 1)) for tile in tiles)
                for dtype, configuration in configurations:
                    with configuration:
                        a = self.inputs(sum(counts), qweights, dtype)
                        y = self.run(way, a, counts, qweights)
                        for expert, rows in rows_of(counts):
                            alone = self.run_plain(way, a[rows], qweights[expert])
                            assert_same_bits(y[rows], alone, f"{self.op} {way} {layout} expert {expert}")

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_rows_of_no_expert_become_zeros(self, way, dtype):
        """Whatever they hold."""
        counts, T = (2, 0, 5), 12
        qweights = cases.quantized_experts(3, 48, 128)
        for filling in (1.0, torch.nan):
            y = self.run(way, torch.full((T, self.sizes(48, 128)[0]), filling, dtype=dtype), counts, qweights)
            assert torch.equal(y[7:], torch.zeros_like(y[7:]))
            assert not (y[:7] == 0).all(1).any()

    @pytest.mark.every_kernel
    @pytest.mark.ways("executor", "cuda", "interpreter", "triton")
    @pytest.mark.parametrize(
        "offsets", [(4, 2, 9), (4, 30, 9), (-3, 5, 5), (2**31 - 1, 3, 2**31 - 1), (0, -1, -(2**31))], ids=str
    )
    def test_offsets_that_fall_or_exceed_the_rows(self, way, offsets):
        """They count as min(offset, T), or as the one before where that is larger. (On the CPU they are an error.)"""
        T = 12
        qweights = cases.quantized_experts(3, 40, 64)
        a = self.inputs(T, qweights, BFLOAT16)
        offsets = torch.tensor(offsets, dtype=torch.int32)
        sound = offsets.clamp(0, T).cummax(0).values
        counts = sound.diff(prepend=sound.new_zeros(1)).tolist()
        y = self.run(way, a, offsets, qweights)
        assert_same_bits(y, self.run(way, a, sound, qweights), f"{way} {offsets.tolist()}")
        assert_right(y, self.op, a, counts, qweights, f"{way}")

    # Who sees what.

    @pytest.mark.every_kernel
    def test_a_row_does_not_see_the_others(self, way):
        """Neither NaN in another expert's row, its own expert's or one of no expert, nor another expert's scales."""
        counts = (5, 0, 9)
        qweights = cases.quantized_experts(3, 40, 128, Layout(scale_codebook=None))
        for dtype in way.dtypes(self.op):
            a = self.inputs(16, qweights, dtype)
            keep = torch.arange(16) % 5 != 4
            clean = self.run(way, a, counts, qweights)
            for value in way.pick((torch.nan, torch.inf, 0.0, 1e4), (torch.nan,)):
                a[~keep] = value
                y = self.run(way, a, counts, qweights)
                assert_same_bits(y[keep], clean[keep], f"{way} other rows beside {value}")
                if value != value:
                    assert y[[4, 9]].isnan().all()
                    assert not y[14].any()
            a[~keep] = 0
            others = cases.quantized_experts(3, 40, 128, Layout(scale_codebook=None))
            others.absmax[:2] = torch.nan
            y = self.run(way, a, counts, others)
            assert y[:5].isnan().all()
            assert_same_bits(y[5:][keep[5:]], clean[5:][keep[5:]], f"{way} rows of the third expert")

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_a_row_alone_has_the_bits_that_it_has_among_others(self, way, dtype):
        counts = (4, 1, 0, 18)
        qweights = cases.quantized_experts(4, 64, 128)
        a = self.inputs(23, qweights, dtype)
        alone = self.run(way, a, counts, qweights)
        for row in way.pick((0, 3, 4, 5, 22), (4, 22)):
            for value in way.pick((torch.nan, torch.inf, 0.0, 1e4), (torch.inf,)):
                others = torch.full_like(a, value)
                others[row] = a[row]
                y = self.run(way, others, counts, qweights)
                assert_same_bits(y[row], alone[row], f"{way} row {row} among {value}")

    @pytest.mark.every_kernel
    def test_a_nan_block_stays_with_its_expert(self, way):
        counts = (3, 3, 3)
        qweights = cases.quantized_experts(3, 40, 128, Layout(scale_codebook=None))
        qweights.absmax[1, 7, 1] = torch.nan
        for dtype in way.dtypes(self.op):
            y = self.run(way, self.inputs(9, qweights, dtype), counts, qweights)
            hit = y[3:6, 64:] if self.is_dgrad else y[3:6, 7]
            assert hit.isnan().all()
            assert y.isnan().sum() == hit.numel()

    def bits_under_every_schedule(self, way, a, counts, qweights, what):
        first = self.assert_right(way, a, counts, qweights, what)
        for schedule in way.schedules():
            assert_same_bits(self.run(way, a, counts, qweights), first, f"{way} {what}, {schedule}")

    @pytest.mark.every_kernel
    def test_bits_depend_on_no_schedule(self, way):
        if way.kernel == "tiled":
            pytest.skip(f"{way}: the next test has shapes for its stages")
        counts = (3, 1, 0, 40)
        for shape in way.pick(((256, 256),), ((104, 320),)):
            qweights = cases.quantized_experts(4, *shape)
            for dtype in way.pick(way.dtypes(self.op), (BFLOAT16,)):
                self.bits_under_every_schedule(way, self.inputs(44, qweights, dtype), counts, qweights, "")

    @pytest.mark.ways("executor", "cuda")
    def test_bits_depend_on_no_schedule_where_stages_are_filled_again(self, way):
        """As of linear: every tile, unsplit and split, in both forms of scales."""
        for reuse in way.reuses(self.op):
            qweights = cases.quantized_experts(2, reuse.N, reuse.K, way.layout_of(reuse))
            with way.running(*reuse.kernel):
                a = self.inputs(reuse.M, qweights, reuse.dtype)
                self.bits_under_every_schedule(way, a, (reuse.M - 1, 1), qweights, f"{reuse}")
        way.assert_stages_were_filled_again(self.op)

    # Sizes and strides.

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_strided_input(self, way, dtype):
        counts = (2, 0, 7)
        qweights = cases.quantized_experts(3, 48, 128)
        depth = self.sizes(48, 128)[0]
        base = cases.activations(300, 301, dtype)
        for name, a in {
            "columns": base[:9, 1 : depth + 1],
            "every-other-column": base[:9, 1 : 2 * depth + 1 : 2],
            "column-major": base[:depth, :9].T,
            "expanded-row": base[:1, 3 : depth + 3].expand(9, depth),
            "expanded-scalar": base[0, 0].expand(9, depth),
        }.items():
            expected = self.run(way, a.contiguous(), counts, qweights)
            assert_same_bits(self.run(way, a, counts, qweights), expected, f"{self.op} {way} {name}")

    @pytest.mark.ways("cpu", "interpreter", "triton")
    def test_input_at_any_address(self, way):
        """(The tensor cores' CUDA kernels take aligned pointers; an unaligned input takes another kernel.)"""
        if way.is_reference:
            pytest.skip("the reference multiplies by torch, whose bits depend on the alignment")
        counts, qweights = (2, 0, 4), cases.quantized_experts(3, 48, 128)
        a = self.inputs(7, qweights, BFLOAT16)
        moved = torch.zeros(a.numel() + 1, dtype=a.dtype)[1:].view(a.shape).copy_(a)
        assert_same_bits(self.run(way, moved, counts, qweights), self.run(way, a, counts, qweights), f"{way}")

    def test_empty(self, way):
        for E, N, K in ((0, 8, 64), (2, 0, 64), (2, 8, 0), (2, 8, 64)):
            qweights = quantize_experts(torch.randn(E, N, K))
            for T in (0, 3, 900):
                for end in {0, T}:
                    if T == 900 and E * N * K * end > 0:
                        continue  # an ordinary product
                    y = self.run(
                        way, self.inputs(T, qweights, BFLOAT16), torch.full((E,), end, dtype=torch.int32), qweights
                    )
                    assert y.shape == (T, self.sizes(N, K)[1])
                    assert E * N * K * end > 0 or not y.any()

    # The CUDA kernels.

    @pytest.mark.ways("executor")
    @pytest.mark.every_kernel
    @pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
    def test_nothing_outside_of_a_tensor_is_read(self, way, at_end):
        """Inputs end (or begin) at a page that may not be touched."""
        for counts in ((1, 0, 16), (0, 3), (70,)):
            qweights = cases.quantized_experts(len(counts), 40, 128)
            a = self.inputs(sum(counts) + 1, qweights, BFLOAT16)
            tensors = a, offsets_of(counts), *qweights.op_args()
            # The ends of these tensors are aligned to 16 bytes, as the tensor cores' kernels want x and packed.
            fenced = [guarded(t, at_end) if isinstance(t, torch.Tensor) else t for t in tensors]
            assert_same_bits(way.run(self.op, *fenced), way.run(self.op, *tensors), f"{way} {counts}")

    def assert_chosen(self, way, a, E, kernel):
        """The kernel by the mean of the experts' rows; x of any strides is taken, and what no tensor core takes."""
        way.executor.reset()
        shape = (a.shape[1], 128) if self.is_dgrad else (48, 128)
        counts, qweights = [a.shape[0] // E] * E, cases.quantized_experts(E, *shape)
        assert_right(self.run(way, a, counts, qweights), self.op, a.contiguous(), counts, qweights, kernel)
        if kernel == ways.CUDA_DEQUANTIZE_GEMM:
            expected = {"sound_offsets_kernel", "dequantize_experts_kernel", "zero_rows_of_none_kernel"}
        else:
            expected = {f"{ways.CUDA_KERNELS[self.op][kernel]}_kernel"}
        assert way.kernel_names() == expected

    # The Triton kernels.

    @pytest.mark.ways("interpreter")
    def test_every_element_is_written_by_one_program(self, way):
        """The interpreter runs programs in order, so that a later one hides what an earlier one wrote into its rows."""
        from support.triton_interpreter import only_program

        counts, T = (3, 0, 17, 8), 33
        qweights = cases.quantized_experts(4, 72, 128)
        a = self.inputs(T, qweights, BFLOAT16)
        programs = 2 * ((T + 5 * 15) // 16)  # two tiles of columns; of rows as many as five groups can have
        with way.running("fused", way.buckets(self.op)[0][1]):
            expected, written = self.run(way, a, counts, qweights), 0
            for program in range(programs):
                with only_program(program):
                    y = self.run(way, a, counts, qweights)
                here = ~y.isnan()  # the rest is conftest.py's poison
                assert torch.equal(y[here], expected[here])
                written = written + here.int()
        assert (written == 1).all()

    def recorded(self, way, monkeypatch, a, E, qweights):
        """(programs, keyword arguments) of a launch that does not run. A meta tensor has no value to be read."""
        kernel, choose, function = LaunchRecorder(), way.backend.choose, getattr(way.ops, self.op)
        monkeypatch.setitem(function.__globals__, f"{self.op}_kernel", kernel)
        monkeypatch.setitem(function.__globals__, "on_device_of", lambda tensor: contextlib.nullcontext())
        table = choose.table_on(a.device)
        monkeypatch.setattr(choose, "table_on", lambda device: table)
        offsets = torch.empty(E, dtype=torch.int32, device="meta")
        function(a.to("meta"), offsets, *qweights.to("meta").op_args())
        (((programs,), options),) = kernel.launches
        return programs, options

    @pytest.mark.ways("interpreter")
    def test_no_run_of_a_sum_is_longer_than_512_terms_and_the_host_reads_nothing(self, way, monkeypatch):
        """Terms of fp32, or steps of 16 terms of a tensor core (docs/design.md, section 7)."""
        for depth in (8192, 8256, 20032):
            qweights = cases.stacked([cases.random_bytes(*((depth, 64) if self.is_dgrad else (8, depth)))] * 2)
            for rows, dtype in itertools.product((1, 16, 64), DTYPES):
                a = torch.zeros(2 * rows, depth, dtype=dtype)
                _, options = self.recorded(way, monkeypatch, a, 2, qweights)
                assert options["RUN"] == (512 if dtype == torch.float32 else 0 if depth == 8192 else 8192)

    @pytest.mark.ways("interpreter")
    def test_the_configuration_is_that_of_the_mean_rows(self, way, monkeypatch):
        """And the grid is one of as many tiles of rows as there can be, whatever the offsets."""
        qweights = cases.quantized_experts(6, 64, 64)
        buckets = way.buckets(self.op)
        for (first, config), (after, _) in zip(buckets, [*buckets[1:], (200, None)]):
            for T in (6 * first, 6 * (after - 1)):
                a = self.inputs(T, qweights, BFLOAT16)
                programs, options = self.recorded(way, monkeypatch, a, 6, qweights)
                assert (options["BLOCK_M"], options["num_warps"]) == (config.BLOCK_M, config.warps)
                assert programs == (T + 7 * (config.BLOCK_M - 1)) // config.BLOCK_M

    @pytest.mark.ways("interpreter", "triton")
    def test_experts_are_not_dequantized_first(self, way):
        qweights = cases.quantized_experts(2, 8, 64)
        message = f"nf4kernels.{self.op}: .* have no dequantize_gemm"
        with way.running(ways.TRITON_DEQUANTIZE_GEMM), pytest.raises(RuntimeError, match=message):
            self.run(way, self.inputs(3, qweights, BFLOAT16), (1, 2), qweights)

    @pytest.mark.ways("interpreter")
    def test_indices_past_2_to_the_32(self, way):
        """The first tile of the last of two experts, most of whose weights are never touched."""
        from support.triton_interpreter import only_program

        torch.use_deterministic_algorithms(False)  # its poison would touch all of the output
        N, K = (48, 2**27) if self.is_dgrad else (2**20, 4096)
        near = cases.quantized(*((N, 64) if self.is_dgrad else (64, K)), Layout(scale_codebook=None))
        packed, absmax = untouched(N * K, torch.uint8), untouched(2 * N * K // 64, torch.float32)
        rows, columns = near.shape
        packed.view(2, N, K // 2)[1, :rows, : columns // 2] = near.packed
        absmax.view(2, N, K // 64)[1, :rows, : columns // 64] = near.absmax
        a, offsets = cases.activations(2, self.sizes(N, K)[0], BFLOAT16), torch.tensor([0, 2], dtype=torch.int32)
        with only_program(0):
            y = way.run(self.op, a, offsets, packed, absmax, None, None, near.code, None, N, K, 64)
        w = cases.dense(near)
        assert_product_within_bound(y[:, :64], a, w if self.is_dgrad else w.T, f"{self.op} of a far expert")


class TestGroupedLinear(GroupedContract):
    op, plain, is_dgrad = "grouped_linear", "linear", False

    @pytest.mark.ways("executor")
    @pytest.mark.parametrize(
        ("T", "dtype", "E", "kernel"),
        [
            (96, BFLOAT16, 6, "small"),
            (97, BFLOAT16, 6, "tiled"),
            (9, torch.float32, 2, "any"),
            (832, BFLOAT16, 1, "tiled"),
            (833, BFLOAT16, 1, ways.CUDA_DEQUANTIZE_GEMM),
        ],
    )
    def test_the_choice(self, way, T, dtype, E, kernel):
        self.assert_chosen(way, cases.activations(T, 128, dtype), E, kernel)

    @pytest.mark.ways("executor")
    def test_the_choice_of_strides_and_addresses(self, way):
        buffer = cases.activations(1, 9 * 128 + 8, BFLOAT16)[0]
        self.assert_chosen(way, cases.activations(128, 9, BFLOAT16).T, 2, "small")
        self.assert_chosen(way, buffer[1 : 1 + 9 * 128].view(9, 128), 2, "any")

    @pytest.mark.ways("executor", "cuda")
    @pytest.mark.parametrize(
        ("kernel", "N", "dtype", "reason"),
        [
            (ways.CUDA_DEQUANTIZE_GEMM, 40, torch.float16, "of experts needs bf16"),
            ("tiled", 40, torch.float32, "true fp32"),
        ],
    )
    def test_a_forced_kernel_that_cannot_run_is_an_error(self, way, kernel, N, dtype, reason):
        qweights = cases.quantized_experts(2, N, 64)
        with way.running(kernel), pytest.raises(RuntimeError, match=f"forced kernel {kernel} cannot run.*{reason}"):
            self.run(way, self.inputs(3, qweights, dtype), (1, 2), qweights)


class TestGroupedLinearDgrad(GroupedContract):
    op, plain, is_dgrad = "grouped_linear_dgrad", "linear_dgrad", True

    @pytest.mark.ways("executor")
    @pytest.mark.parametrize(
        ("T", "N", "dtype", "E", "kernel"),
        [
            (5, 48, BFLOAT16, 2, "tiled"),
            (5, 47, BFLOAT16, 2, "any"),
            (5, 48, torch.float32, 2, "any"),
            (416, 48, BFLOAT16, 1, "tiled"),
            (417, 48, BFLOAT16, 1, ways.CUDA_DEQUANTIZE_GEMM),
        ],
    )
    def test_the_choice(self, way, T, N, dtype, E, kernel):
        self.assert_chosen(way, cases.activations(T, N, dtype), E, kernel)

    @pytest.mark.ways("executor")
    def test_a_long_contraction_is_split(self, way):
        """A sum over more than 512 products of mma is not: N in two parts, and a few rows of them at a time."""
        N, counts = 32776, (14, 0, 9, 12)
        qweights = cases.quantized_experts(len(counts), N, 128)
        with way.running("tiled"):
            self.assert_right(way, self.inputs(sum(counts) + 3, qweights, BFLOAT16), counts, qweights, "split")
        products = [run for run in way.launches() if "tiled" in run.kernel]
        assert {run.grid[1] for run in products} == {2}
        assert sum(run.count for run in products) == 3, "16 rows of partial sums have room"

    @pytest.mark.ways("executor", "cuda")
    @pytest.mark.parametrize(
        ("kernel", "N", "reason"),
        [
            (ways.CUDA_DEQUANTIZE_GEMM, 37, "N a multiple of 8"),
            ("small", 40, "the small kernel is linear's"),
            ("tiled", 37, "N a multiple of 8"),
        ],
    )
    def test_a_forced_kernel_that_cannot_run_is_an_error(self, way, kernel, N, reason):
        qweights = cases.quantized_experts(2, N, 64)
        with way.running(kernel), pytest.raises(RuntimeError, match=f"forced kernel {kernel} cannot run.*{reason}"):
            self.run(way, self.inputs(3, qweights, BFLOAT16), (1, 2), qweights)


def test_the_reference_keeps_the_bound():
    counts = (0, 3, 1, 40)
    qweights = cases.quantized_experts(4, 48, 256)
    x, dy = cases.activations(46, 256, torch.float32), cases.activations(46, 48, torch.float32)
    arguments = offsets_of(counts), *qweights.op_args()
    y, dx = cases.reference.grouped_linear(x, *arguments), cases.reference.grouped_linear_dgrad(dy, *arguments)
    assert_right(y, "grouped_linear", x, counts, qweights, "reference")
    assert_right(dx, "grouped_linear_dgrad", dy, counts, qweights, "reference")
    for bad in ((4, 3, 44, 44), (-1, 3, 44, 44), (4, 4, 44, 47)):
        with pytest.raises(RuntimeError, match="expert_offsets must not fall and not exceed T=46"):
            cases.reference.grouped_linear(x, torch.tensor(bad), *qweights.op_args())


def test_as_many_tiles_as_there_can_be(interpreter):
    most_tiles = importlib.import_module("nf4kernels.backends.triton.grouped_linear").most_tiles
    for T, E, rows in itertools.product(range(1, 8), range(4), (1, 2, 4)):
        splits = (ends for ends in itertools.product(range(T + 1), repeat=E) if sorted(ends) == list(ends))
        counts = ([b - a for a, b in itertools.pairwise((0, *ends, T))] for ends in splits)
        assert most_tiles(T, E, rows) == max(sum(-(-count // rows) for count in each) for each in counts)
