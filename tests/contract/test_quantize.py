"""quantize and quantize_absmax, bit for bit the reference, at every instruction set."""

import pytest
import torch
from support import cases
from support.cases import BLOCK_SIZES, DEFAULT, DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, Layout, dtype_id, shape_id
from support.numerics import assert_same_bits
from support.special import FINITE_BLOCKS, scale_ties, special_weight, ties

from nf4kernels import dequantize, quantize, reference
from nf4kernels.codebook import SCALE_CODEBOOKS

ops = torch.ops.nf4kernels


def assert_quantize_equals_reference(w, code, block_size, what):
    packed, absmax = ops.quantize(w, code, block_size)
    expected_packed, expected_absmax = reference.quantize(w, code, block_size)
    assert_same_bits(absmax, expected_absmax, f"quantize absmax, {what}")
    assert_same_bits(packed, expected_packed, f"quantize packed, {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_shape(isa, shape, dtype):
    for block_size in (32, 64, 256):
        assert_quantize_equals_reference(
            cases.weight(*shape, dtype), DEFAULT.code, block_size, f"{isa} {shape} {dtype} block {block_size}"
        )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(isa, layout):
    for shape in ((64, 96), (37, 100), (5, 4096), (3, 8191)):
        w = cases.weight(*shape, torch.bfloat16)
        assert_quantize_equals_reference(w, layout.code, layout.block_size, f"{isa} {shape} {layout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_large_enough_for_every_thread(isa, dtype):
    w = cases.weight(300, 1000, dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_quantize_equals_reference(w, DEFAULT.code, 64, f"{isa} {dtype} threads {threads}")


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=shape_id)
def test_empty(isa, shape):
    qweight = quantize(torch.empty(shape))
    assert qweight.shape == shape
    assert qweight.scale_offset == 0
    assert dequantize(qweight).shape == shape


@pytest.mark.parametrize("columns", [64, 96, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_special_blocks(isa, dtype, columns):
    names = [n for n, block in FINITE_BLOCKS.items() if block.to(dtype).isfinite().all()]
    w = special_weight(columns, names).to(dtype)
    for block_size in (32, 64, 128):
        assert_quantize_equals_reference(w, DEFAULT.code, block_size, f"{isa} {dtype} columns {columns} {block_size}")


def test_zero_block_is_code_of_zero(isa):
    for value in (0.0, -0.0):
        packed, absmax = ops.quantize(torch.full((2, 64), value), DEFAULT.code, 64)
        assert (packed == 0x77).all()
        assert torch.equal(absmax, torch.zeros(2, 1))
        assert not torch.signbit(absmax).any()


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_ties_take_the_lower_code(isa, codebook, block_size):
    code = Layout(codebook=codebook).code
    w = ties(code, block_size)
    assert_quantize_equals_reference(w, code, block_size, f"{isa} {codebook} ties")
    decoded = dequantize(quantize(w, code if codebook == "custom" else codebook, block_size, False), torch.float32)
    levels = code.sort().values
    assert torch.equal(decoded[0, 1:16], levels[:-1]), "a tie must take the lower level"
    assert torch.equal(decoded[0, 16:31], levels[1:]), "the next float above a tie must take the upper level"
    assert torch.equal(decoded[1], 2 * decoded[0]), "scaling a block by 2 must change its scale only"


# What cannot be found by bucket (levels closer than 1/15, equal, or midpoints beyond 1), and midpoints on bucket edges.
LEVELS = {
    "close": torch.tensor([-1.0, *torch.linspace(-1e-6, 1e-6, 14).tolist(), 1.0]),
    "two-close": torch.cat([torch.linspace(-1, 0.8, 13), torch.tensor([0.9, 0.91, 0.92])]),
    "equal": torch.full((16,), 0.25),
    "beyond": torch.linspace(-3, 3, 16),
    "edges": torch.linspace(-14.5, 15.5, 16) / 15,
}


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom", *LEVELS])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_16_bit_value_and_any_levels(isa, codebook, dtype):
    """Every bf16 or fp16 number within its block's absmax, and as many fp32 ones about the midpoints."""
    code = LEVELS[codebook] if codebook in LEVELS else Layout(codebook=codebook).code
    if dtype == torch.float32:
        values = ties(code, 32)[0].repeat(40) * (1 + torch.arange(-20, 20).repeat_interleave(64) * 2.0**-23)
    else:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.abs() <= 1]
    w = torch.cat([torch.ones(len(values) // 31, 1, dtype=dtype), values[: len(values) // 31 * 31].view(-1, 31)], 1)
    for scale in (1.0, -0.37):  # a reciprocal that is exact, and one that is not
        assert_quantize_equals_reference(w * scale, code, 32, f"{isa} {codebook} {dtype} times {scale}")


@pytest.mark.parametrize("shape", [(3, 5), (5, 63), (33, 65), (129, 31), (1, 1)], ids=shape_id)
@pytest.mark.parametrize(("codebook", "nibble"), [("nf4", 7), ("int4", 7), ("fp4", 0), ("af4", 7)])
def test_odd_tail_nibble_is_the_code_of_zero(isa, shape, codebook, nibble):
    packed, _ = ops.quantize(cases.weight(*shape), Layout(codebook=codebook).code, 64)
    assert packed.shape == ((shape[0] * shape[1] + 1) // 2,)
    assert packed[-1] & 15 == nibble


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [(0, 0), (3, 31), (6, 99)])
def test_nonfinite_is_never_a_finite_number(isa, dtype, bad, position):
    w = cases.weight(7, 100, dtype)
    w[position] = bad
    with pytest.raises(ValueError, match=f"at row {position[0]}, column {position[1]}"):
        quantize(w)
    qweight = quantize(w, double_quant=False, nonfinite="propagate")
    assert_quantize_equals_reference(w, DEFAULT.code, 64, f"{isa} {bad}")
    decoded = dequantize(qweight, dtype).view(-1)
    block = (position[0] * 100 + position[1]) // 64
    inside = torch.arange(700) // 64 == block
    assert decoded[inside].isnan().all()
    assert decoded[~inside].isfinite().all()


def test_first_nonfinite_is_named(isa):
    w = torch.zeros(4, 64)
    w[2, 5] = torch.nan
    w[1, 60] = -torch.inf
    with pytest.raises(ValueError, match="got -inf at row 1, column 60"):
        quantize(w)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_non_contiguous_and_offset_views(isa, dtype):
    base = cases.weight(40, 203, dtype)
    for name, view in {
        "transposed": base.T,
        "columns": base[:, 3:103],
        "every-other-column": base[:, 1::2],
        "rows-offset": base[3:, :],
        "expanded": base[:1].expand(5, 203),
    }.items():
        assert_quantize_equals_reference(view, DEFAULT.code, 64, f"{isa} {name}")
        strided = quantize(view)
        contiguous = quantize(view.contiguous())
        assert torch.equal(strided.packed, contiguous.packed), name
        assert torch.equal(strided.absmax, contiguous.absmax), name


@pytest.mark.parametrize("scale_codebook", list(SCALE_CODEBOOKS))
@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 7, 8, 16, 31, 255, 256, 257, 511, 512, 513, 5000])
def test_quantize_absmax(isa, scale_codebook, blocks):
    table = SCALE_CODEBOOKS[scale_codebook]
    generator = torch.Generator().manual_seed(blocks)
    uniform = torch.rand(blocks, generator=generator)
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
        got = ops.quantize_absmax(absmax, table, scale_codebook == "e4m3")
        expected = reference.quantize_absmax(absmax, table, scale_codebook == "e4m3")
        for field, a, b in zip(("absmax", "scale_absmax", "scale_offset"), got, expected):
            assert_same_bits(a, b, f"quantize_absmax {field}, {isa} {scale_codebook} {name} {blocks} blocks")


@pytest.mark.parametrize(("scale_codebook", "peak"), [("e4m3", 448.0), ("dynamic8", 1.0)])
def test_quantize_absmax_ties(isa, scale_codebook, peak):
    table = SCALE_CODEBOOKS[scale_codebook]
    absmax = scale_ties(table, peak)
    index, scale_absmax, offset = ops.quantize_absmax(absmax, table, scale_codebook == "e4m3")
    assert offset == 0
    assert (scale_absmax == peak).all()
    expected = reference.quantize_absmax(absmax, table, scale_codebook == "e4m3")
    assert_same_bits(index, expected[0], f"quantize_absmax ties, {isa} {scale_codebook}")
    at, above, below = table[index.view(3, -1, 2)[:, :, 0].long()]
    assert ((at == above) | (at == below)).all()
    assert (above > below).sum() >= 126, "the floats beside a tie must take the level on their own side"
    if scale_codebook == "dynamic8":
        assert torch.equal(at, below), "a tie must take the lower index"
    else:
        assert (index.view(3, -1)[0] & 1 == 0).all(), "a tie must take the even bit pattern"


def test_e4m3_rounds_ties_to_even(isa):
    """Absmax 512 +- v, v of every midpoint between FP8 neighbours from 256 on, and the largest."""
    table = SCALE_CODEBOOKS["e4m3"]
    midpoints = torch.tensor([272.0, 304.0, 336.0, 368.0, 400.0, 432.0, 448.0])
    index, scale_absmax, offset = ops.quantize_absmax(torch.cat([512 + midpoints, 512 - midpoints]), table, True)
    assert offset == 512
    assert scale_absmax.item() == 448
    positive = (table[index[:7].long()] * 448).round()
    assert positive.tolist() == [256.0, 320.0, 320.0, 384.0, 384.0, 448.0, 448.0]
    assert torch.equal(index[7:], index[:7] | 0x80)


def test_quantize_absmax_keeps_the_shape(isa):
    for shape in ((5, 7), (0, 3), (300,), (1, 1)):
        index, scale_absmax, offset = ops.quantize_absmax(torch.rand(shape), SCALE_CODEBOOKS["e4m3"], True)
        assert index.shape == shape
        assert scale_absmax.shape == (-(-index.numel() // 256),)
        assert offset.shape == ()


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
