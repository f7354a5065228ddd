"""quantize and quantize_absmax: bit for bit the reference, whatever runs them."""

import pytest
import torch
from support import cases
from support.cases import BLOCK_SIZES, DEFAULT, DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, Layout, dtype_id, shape_id
from support.guarded import guarded, untouched
from support.numerics import assert_same_bits
from support.special import FINITE_BLOCKS, groups_at_a_tie, scale_ties, special_weight, ties

from nf4kernels import dequantize, quantize, reference
from nf4kernels.codebook import SCALE_CODEBOOKS

CODEBOOKS = ("nf4", "fp4", "int4", "af4", "custom")


def assert_equals_reference(way, w, code, block_size, what):
    """Returns (packed, absmax)."""
    packed, absmax = way.run("quantize", w, code, block_size)
    expected_packed, expected_absmax = reference.quantize(w, code, block_size)
    assert_same_bits(absmax, expected_absmax, f"quantize absmax, {way} {what}")
    assert_same_bits(packed, expected_packed, f"quantize packed, {way} {what}")
    return packed, absmax


def assert_absmax_equals_reference(way, absmax, scale_codebook, what, table=None):
    """Returns the three results; `table` is the scale codebook's where it is to lie elsewhere."""
    table = SCALE_CODEBOOKS[scale_codebook] if table is None else table
    got = way.run("quantize_absmax", absmax, table, scale_codebook == "e4m3")
    expected = reference.quantize_absmax(absmax, table, scale_codebook == "e4m3")
    for field, a, b in zip(("absmax", "scale_absmax", "scale_offset"), got, expected):
        assert_same_bits(a, b, f"quantize_absmax {field}, {way} {scale_codebook} {what}")
    return got


def decoded(packed, absmax, shape, codebook, block_size):
    layout = Layout(block_size, codebook, None)
    return cases.dense(cases.from_parts(packed, absmax, shape, layout, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_shape(way, dtype):
    interpreted = way.name == "interpreter"
    for shape in SHAPES[::3] if interpreted and dtype == torch.float16 else SHAPES:
        for block_size in (64, 4096) if interpreted else (32, 64, 256, 4096):
            assert_equals_reference(way, cases.weight(*shape, dtype), DEFAULT.code, block_size, f"{shape} {block_size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_layout(way, dtype):
    for layout in LAYOUTS:
        for shape in way.pick(((64, 96), (37, 100), (5, 4096), (3, 8191)), ((37, 100), (3, 8191))):
            w = cases.weight(*shape, dtype)
            assert_equals_reference(way, w, layout.code, layout.block_size, f"{shape} {layout}")


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
def test_empty(way, shape):
    packed, absmax = assert_equals_reference(way, torch.zeros(shape), DEFAULT.code, 64, "empty")
    assert packed.numel() == absmax.numel() == 0


@pytest.mark.parametrize("columns", [64, 96, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_special_blocks(way, dtype, columns):
    names = [n for n, block in FINITE_BLOCKS.items() if block.to(dtype).isfinite().all()]
    w = special_weight(columns, names).to(dtype)
    for block_size in (32, 64, 128):
        assert_equals_reference(way, w, DEFAULT.code, block_size, f"{dtype} columns {columns} {block_size}")


def test_zero_block_is_code_of_zero(way):
    for value in (0.0, -0.0):
        for rows in (2, 16):
            packed, absmax = way.run("quantize", torch.full((rows, 64), value), DEFAULT.code, 64)
            assert (packed == 0x77).all()
            assert torch.equal(absmax, torch.zeros(rows, 1))
            assert not torch.signbit(absmax).any()


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_ties_take_the_lower_code(way, codebook, block_size):
    code = Layout(codebook=codebook).code
    w = ties(code, block_size).repeat(16, 1)  # more than one tile of the CUDA kernel
    packed, absmax = assert_equals_reference(way, w, code, block_size, f"{codebook} ties")
    values = decoded(packed, absmax, tuple(w.shape), codebook, block_size)
    levels = code.sort().values
    assert torch.equal(values[0, 1:16], levels[:-1]), "a tie must take the lower level"
    assert torch.equal(values[0, 16:31], levels[1:]), "the next float above a tie must take the upper level"
    assert torch.equal(values[1], 2 * values[0]), "scaling a block by 2 must change its scale only"


# What cannot be found by bucket (levels closer than 1/15, equal, or midpoints beyond 1), and midpoints on bucket edges.
LEVELS = {
    "close": torch.tensor([-1.0, *torch.linspace(-1e-6, 1e-6, 14).tolist(), 1.0]),
    "two-close": torch.cat([torch.linspace(-1, 0.8, 13), torch.tensor([0.9, 0.91, 0.92])]),
    "equal": torch.full((16,), 0.25),
    "beyond": torch.linspace(-3, 3, 16),
    "edges": torch.linspace(-14.5, 15.5, 16) / 15,
}


@pytest.mark.parametrize("codebook", [*CODEBOOKS, *LEVELS])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_16_bit_value_and_any_levels(way, codebook, dtype):
    """Every bf16 or fp16 number within its block's absmax, and as many fp32 ones about the midpoints."""
    if way.name in ("executor", "interpreter") and dtype == torch.float16:
        pytest.skip(f"{way}: fp16 is converted to fp32 as bf16 is, and then it is one kernel")
    code = LEVELS[codebook] if codebook in LEVELS else Layout(codebook=codebook).code
    for block_size in (32, 4096):
        assert_equals_reference(way, ties(code, block_size), code, block_size, f"{codebook} ties")
    if dtype == torch.float32:
        values = ties(code, 32)[0].repeat(40) * (1 + torch.arange(-20, 20).repeat_interleave(64) * 2.0**-23)
    else:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.abs() <= 1]
    w = torch.cat([torch.ones(len(values) // 31, 1, dtype=dtype), values[: len(values) // 31 * 31].view(-1, 31)], 1)
    for scale in (1.0, -0.37):  # a reciprocal that is exact, and one that is not
        assert_equals_reference(way, w * scale, code, 32, f"{codebook} {dtype} times {scale}")


def test_midpoint_of_two_negative_zeros(way):
    code = Layout(codebook="int4").code.clone()
    code[code == 0] = -0.0
    w = torch.tensor([1.0, 0.0, -0.0, 0.05]).repeat(16, 64)
    assert_equals_reference(way, w, code, 64, "midpoint -0")


@pytest.mark.parametrize(("codebook", "nibble"), [("nf4", 7), ("int4", 7), ("fp4", 0), ("af4", 7)])
def test_odd_tail_nibble_is_the_code_of_zero(way, codebook, nibble):
    for shape in ((3, 5), (5, 63), (33, 65), (129, 31), (1, 1)):
        packed, _ = way.run("quantize", cases.weight(*shape), Layout(codebook=codebook).code, 64)
        assert packed.shape == ((shape[0] * shape[1] + 1) // 2,)
        assert packed[-1] & 15 == nibble


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_nonfinite_block_is_nan_and_the_code_of_zero(way, codebook, dtype):
    """Never a finite number, and no other block sees it."""
    code = Layout(codebook=codebook).code
    for bad in (torch.nan, torch.inf, -torch.inf):
        for position in ((0, 0), (3, 31), (6, 299)):
            w = cases.weight(7, 300, dtype)
            w[position] = bad
            for block_size in (32, 64, 1024):
                packed, absmax = assert_equals_reference(way, w, code, block_size, f"{bad} {position} {block_size}")
                inside = torch.arange(2100) // block_size == (position[0] * 300 + position[1]) // block_size
                values = decoded(packed, absmax, (7, 300), codebook, block_size).view(-1)
                assert values[inside].isnan().all()
                assert values[~inside].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strided_and_offset_views(way, dtype):
    base = cases.weight(40, 203, dtype)
    for name, view in {
        "transposed": base.T,
        "columns": base[:, 3:103],
        "every-other-column": base[:, 1::2],
        "every-other-row": base[::2],
        "rows-offset": base[3:, :],
        "expanded": base[:1].expand(5, 203),
    }.items():
        strided = assert_equals_reference(way, view, DEFAULT.code, 64, name)
        for a, b in zip(strided, way.run("quantize", view.contiguous(), DEFAULT.code, 64)):
            assert_same_bits(a, b, f"{way} {name}")


def test_bits_depend_on_no_schedule(way):
    """Nor on the number of threads; a weight and scales large enough for each to have a part."""
    for dtype in DTYPES:
        w, absmax = cases.weight(*way.pick((300, 1000), (3, 8191)), dtype), torch.rand(5000)
        first = [way.run("quantize", w, layout.code, layout.block_size) for layout in (DEFAULT, Layout(4096, "fp4"))]
        for schedule in way.schedules():
            for layout, expected in zip((DEFAULT, Layout(4096, "fp4")), first):
                again = assert_equals_reference(way, w, layout.code, layout.block_size, f"{schedule} {layout}")
                for a, b in zip(again, expected):
                    assert_same_bits(a, b, f"{way} {schedule}")
            for name in SCALE_CODEBOOKS:
                assert_absmax_equals_reference(way, absmax, name, f"{schedule}")


# quantize_absmax.


@pytest.mark.parametrize("scale_codebook", list(SCALE_CODEBOOKS))
@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 7, 8, 16, 31, 255, 256, 257, 511, 512, 513, 5000, 8500, 70001])
def test_quantize_absmax(way, scale_codebook, blocks):
    few = (0, 1, 2, 7, 31, 255, 257, 513, *([8500] if scale_codebook == "dynamic8" else []))
    if way.name == "interpreter" and blocks not in few:
        pytest.skip("the interpreter: sizes around a superblock, and 8500, which are several programs of each kernel")
    uniform = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks))
    # Equal, ordinary, heavy-tailed, tiny (s is clamped), and so large that an fp32 sum overflows.
    for name, absmax in {
        "uniform": uniform,
        "equal": torch.full((blocks,), 0.37),
        "heavy": uniform**20,
        "tiny": uniform * 1e-38,
        "denormal": uniform * 1e-41,
        "huge": uniform * 3e38,
        "one-large": torch.cat([uniform[1:] * 1e-6, torch.ones(min(blocks, 1))]),
    }.items():
        assert_absmax_equals_reference(way, absmax, scale_codebook, f"{name} {blocks} blocks")


@pytest.mark.parametrize(("scale_codebook", "peak"), [("e4m3", 448.0), ("dynamic8", 1.0)])
def test_quantize_absmax_ties(way, scale_codebook, peak):
    table = SCALE_CODEBOOKS[scale_codebook]
    absmax = scale_ties(table, peak)
    index, scale_absmax, offset = assert_absmax_equals_reference(way, absmax, scale_codebook, "ties")
    assert offset == 0
    assert (scale_absmax == peak).all()
    at, above, below = table[index.view(3, -1, 2)[:, :, 0].long()]
    assert ((at == above) | (at == below)).all()
    assert (above > below).sum() >= 126, "the floats beside a tie must take the level on their own side"
    if scale_codebook == "dynamic8":
        assert torch.equal(at, below), "a tie must take the lower index"
    else:
        assert (index.view(3, -1)[0] & 1 == 0).all(), "a tie must take the even bit pattern"


def test_quantize_absmax_by_e4m3_rounds_ties_to_even(way):
    """Absmax 512 +- v, v of every midpoint between FP8 neighbours from 256 on, and the largest."""
    table = SCALE_CODEBOOKS["e4m3"]
    midpoints = torch.tensor([272.0, 304.0, 336.0, 368.0, 400.0, 432.0, 448.0])
    absmax = torch.cat([512 + midpoints, 512 - midpoints])
    index, scale_absmax, offset = way.run("quantize_absmax", absmax, table, True)
    assert offset == 512
    assert scale_absmax.item() == 448
    positive = (table[index[:7].long()] * 448).round()
    assert positive.tolist() == [256.0, 320.0, 320.0, 384.0, 384.0, 448.0, 448.0]
    assert torch.equal(index[7:], index[:7] | 0x80)


def test_quantize_absmax_divides_with_one_rounding(way):
    """448 / s as a correctly rounded quotient: where it is a product by a reciprocal, ties of bf16 weights show it."""
    golden = torch.tensor([float.fromhex(h) for h in ("0x1.4cp-4", "0x1.5cp-4", "0x1.76p-4", "0x1.5ap-4")])
    index, _, _ = assert_absmax_equals_reference(way, golden, "e4m3", "golden")
    assert index.tolist() == [250, 225, 126, 233]
    groups = groups_at_a_tie()
    assert len(groups) >= 5
    for absmax in groups:
        assert_absmax_equals_reference(way, absmax, "e4m3", f"{absmax.tolist()}")


@pytest.mark.parametrize(
    ("places", "mean"),
    [((10, 270, 280), 0.0), ((10, 290, 280), 1.0), ((10, 258, 259), 0.0), ((0, 1, 2), 0.0), ((0, 2, 1), 1.0)],
)
def test_quantize_absmax_sums_superblocks_in_order(way, places, mean):
    """2^100, 1 and -2^100 in three superblocks: 1 is lost unless it comes last."""
    absmax = torch.zeros(way.pick(512, max(places) + 1), 256)
    for place, value in zip(places, (2.0**100, 1.0, -(2.0**100))):
        absmax[place, 5] = value
    _, _, offset = assert_absmax_equals_reference(way, absmax, "e4m3", f"{places}")
    assert offset.item() == torch.tensor(mean / absmax.numel()).item()


def test_quantize_absmax_keeps_the_shape(way):
    for shape in ((5, 7), (0, 3), (300,), (1, 1)):
        index, scale_absmax, offset = way.run("quantize_absmax", torch.rand(shape), SCALE_CODEBOOKS["e4m3"], True)
        assert index.shape == shape
        assert scale_absmax.shape == (-(-index.numel() // 256),)
        assert offset.shape == ()


# The public function, which calls both.


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
def test_empty_weights_are_quantized(isa, shape):
    qweight = quantize(torch.empty(shape))
    assert qweight.shape == shape
    assert qweight.scale_offset == 0
    assert dequantize(qweight).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_is_refused_or_propagated(isa, dtype, bad):
    for row, column in ((0, 0), (3, 31), (6, 99)):
        w = cases.weight(7, 100, dtype)
        w[row, column] = bad
        with pytest.raises(ValueError, match=f"at row {row}, column {column}"):
            quantize(w)
        values = dequantize(quantize(w, double_quant=False, nonfinite="propagate"), dtype).view(-1)
        inside = torch.arange(700) // 64 == (row * 100 + column) // 64
        assert values[inside].isnan().all()
        assert values[~inside].isfinite().all()


def test_first_nonfinite_is_named(isa):
    w = torch.zeros(4, 64)
    w[2, 5] = torch.nan
    w[1, 60] = -torch.inf
    with pytest.raises(ValueError, match="got -inf at row 1, column 60"):
        quantize(w)


def test_deterministic(isa):
    w = cases.weight(200, 700, torch.bfloat16)
    first = quantize(w)
    for _ in range(3):
        again = quantize(w)
        for name in ("packed", "absmax", "scale_absmax", "scale_offset"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_error_stays_within_half_a_step(isa, block_size):
    """Without double quantization |w - Ŵ| is at most half the widest gap of the codebook times the block's absmax."""
    w = cases.weight(64, 4096)
    qweight = quantize(w, block_size=block_size, double_quant=False)
    gap = DEFAULT.code.diff().max().item() / 2
    error = (dequantize(qweight, torch.float32) - w).abs().view(-1, block_size)
    assert (error <= qweight.absmax.view(-1, 1) * gap * (1 + 2.0**-20)).all()


# What one way alone has.

KERNELS = ("quantize_units_kernel", "quantize_blocks_kernel")


def test_whole_tiles_and_the_rest_have_kernels_of_their_own(executor_ops):
    flat = cases.weight(1, 4097, torch.bfloat16)[0]
    for numel, begin, block_size, expected in (
        (4096, 0, 64, {KERNELS[0]}),
        (4096, 0, 4096, {KERNELS[0]}),
        (4097, 0, 64, set(KERNELS)),
        (1023, 0, 64, {KERNELS[1]}),
        (4096, 1, 64, {KERNELS[1]}),
    ):
        w = flat[begin : begin + numel].view(1, -1)
        assert w.data_ptr() % 16 == 2 * begin
        executor_ops.executor.reset()
        assert_equals_reference(executor_ops, w, DEFAULT.code, block_size, f"{numel} from {begin}")
        assert {name for name in KERNELS for ran in executor_ops.kernel_names() if name in ran} == expected


@pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
def test_nothing_outside_of_a_tensor_is_read(executor_ops, at_end):
    """Of the CPU's kernels test_memory.py says so."""
    for shape in ((1, 1), (5, 63), (2, 1024), (3, 1000), (1, 8192)):
        for dtype in DTYPES:
            w, code = guarded(cases.weight(*shape, dtype), at_end), guarded(DEFAULT.code, at_end)
            for block_size in (32, 4096):
                assert_equals_reference(executor_ops, w, code, block_size, f"{shape} {dtype} {block_size}")
    for blocks in (1, 257, 5000):
        for name, table in SCALE_CODEBOOKS.items():
            absmax = guarded(torch.rand(blocks), at_end)
            assert_absmax_equals_reference(executor_ops, absmax, name, f"{blocks}", guarded(table, at_end))


@pytest.mark.ways("interpreter")
def test_indices_past_2_to_the_32(way):
    """The last program of a weight most of which is never touched; of the CUDA kernels test_large_grids.py."""
    from support.triton_interpreter import only_program

    numel = 2**32 + 1000
    weight, part = untouched(numel, torch.bfloat16).view(1, -1), slice(2**32, numel)
    weight[0, part] = cases.weight(1, 1000, torch.bfloat16)[0]
    code = DEFAULT.code.clone()
    torch.use_deterministic_algorithms(False)  # its poison would touch all of the output
    with only_program(2**32 // 4096):
        packed, absmax = way.ops.quantize(weight, code, 64)
    expected_packed, expected_absmax = reference.quantize(weight[:, part], code, 64)
    assert_same_bits(packed.view(-1)[2**31 :], expected_packed.view(-1), "far packed")
    assert_same_bits(absmax[2**32 // 64 :], expected_absmax.view(-1), "far absmax")


def test_the_comparison_bites():
    """A code off by one, or a scale off by one bit, fails the comparison that the tests above rely on."""
    w = cases.weight(4, 64)
    packed, absmax = reference.quantize(w, DEFAULT.code, 64)
    wrong = packed.clone()
    wrong[2, 5] ^= 1
    with pytest.raises(AssertionError, match=r"1 of 128 elements differ, the first at \[2, 5\]"):
        assert_same_bits(wrong, packed, "x")
    nudged = torch.nextafter(absmax, torch.tensor(9.0))
    with pytest.raises(AssertionError, match="4 of 4"):
        assert_same_bits(nudged, absmax, "x")
    with pytest.raises(AssertionError, match="the first"):
        assert_same_bits(torch.full((1,), torch.nan), torch.ones(1), "x")
