"""quantize and quantize_absmax in Triton, bit for bit the reference, under Triton's interpreter and on a GPU."""

import pytest
import torch
from support import cases
from support.cases import DEFAULT, DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, Layout, dtype_id
from support.numerics import assert_same_bits
from support.special import FINITE_BLOCKS, scale_ties, special_weight, ties
from test_quantize import LEVELS
from test_quantize_cuda import (
    assert_quantize_absmax_equals_reference,
    assert_quantize_equals_reference,
    untouched,
)

from nf4kernels import reference
from nf4kernels.codebook import SCALE_CODEBOOKS

CODEBOOKS = ("nf4", "fp4", "int4", "af4", "custom")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_shape(triton_ops, dtype):
    for shape in SHAPES:
        for block_size in (32, 64, 4096) if dtype == torch.bfloat16 else (64,):
            w = cases.weight(*shape, dtype)
            assert_quantize_equals_reference(triton_ops, w, DEFAULT.code, block_size, f"{shape} {dtype} {block_size}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(triton_ops, layout):
    for shape in ((37, 100), (3, 8191)):
        w = cases.weight(*shape, torch.bfloat16)
        assert_quantize_equals_reference(triton_ops, w, layout.code, layout.block_size, f"{shape} {layout}")


@pytest.mark.parametrize("columns", [64, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_special_blocks(triton_ops, dtype, columns):
    names = [n for n, block in FINITE_BLOCKS.items() if block.to(dtype).isfinite().all()]
    w = special_weight(columns, names).to(dtype)
    for block_size in (32, 64, 128):
        assert_quantize_equals_reference(triton_ops, w, DEFAULT.code, block_size, f"{dtype} {columns} {block_size}")


@pytest.mark.parametrize("codebook", [*CODEBOOKS, *LEVELS])
def test_ties_take_the_lower_code(triton_ops, codebook):
    code = LEVELS[codebook] if codebook in LEVELS else Layout(codebook=codebook).code
    for block_size in (32, 4096):
        assert_quantize_equals_reference(triton_ops, ties(code, block_size), code, block_size, f"{codebook} ties")
    values = ties(code, 32)[0].repeat(40) * (1 + torch.arange(-20, 20).repeat_interleave(64) * 2.0**-23)
    values = values[values.abs() <= 1]
    w = torch.cat([torch.ones(len(values) // 31, 1), values[: len(values) // 31 * 31].view(-1, 31)], 1)
    for scale in (1.0, -0.37):  # a reciprocal that is exact, and one that is not
        assert_quantize_equals_reference(triton_ops, w * scale, code, 32, f"{codebook} near ties")


def test_zero_block_is_code_of_zero(triton_ops):
    for value in (0.0, -0.0):
        w, code = triton_ops.move((torch.full((2, 64), value), DEFAULT.code))
        packed, absmax = triton_ops.ops.quantize(w, code, 64)
        assert (packed == 0x77).all()
        assert (absmax == 0).all()


@pytest.mark.parametrize(("codebook", "nibble"), [("nf4", 7), ("int4", 7), ("fp4", 0), ("af4", 7)])
def test_odd_tail_nibble_is_the_code_of_zero(triton_ops, codebook, nibble):
    for shape in ((3, 5), (33, 65), (1, 1)):
        w, code = triton_ops.move((cases.weight(*shape), Layout(codebook=codebook).code))
        assert triton_ops.ops.quantize(w, code, 64)[0][-1] & 15 == nibble


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_nonfinite_block_is_nan_and_the_code_of_zero(triton_ops, codebook, dtype):
    for bad, position in ((torch.nan, (0, 0)), (torch.inf, (3, 31)), (-torch.inf, (6, 299))):
        w = cases.weight(7, 300, dtype)
        w[position] = bad
        for block_size in (32, 1024):
            code = Layout(codebook=codebook).code
            assert_quantize_equals_reference(triton_ops, w, code, block_size, f"{bad} {position} {block_size}")


def test_strided_and_empty_weights(triton_ops):
    w = cases.weight(100, 37, torch.bfloat16).T
    assert_quantize_equals_reference(triton_ops, w, DEFAULT.code, 64, "strided")
    for shape in EMPTY_SHAPES:
        assert_quantize_equals_reference(triton_ops, torch.zeros(shape), DEFAULT.code, 64, f"{shape}")


@pytest.mark.parametrize("scale_codebook", list(SCALE_CODEBOOKS))
@pytest.mark.parametrize("blocks", [0, 1, 255, 257, 8500])
def test_quantize_absmax(triton_ops, scale_codebook, blocks):
    uniform = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks))
    table = SCALE_CODEBOOKS[scale_codebook]
    for name, absmax in {
        "uniform": uniform,
        "equal": torch.full((blocks,), 0.37),
        "heavy": uniform**20,
        "tiny": uniform * 1e-38,
        "denormal": uniform * 1e-41,
        "huge": uniform * 3e38,
        "one-large": torch.cat([uniform[1:] * 1e-6, torch.ones(min(blocks, 1))]),
    }.items():
        what = f"{scale_codebook} {name} {blocks} blocks"
        assert_quantize_absmax_equals_reference(triton_ops, absmax, table, scale_codebook == "e4m3", what)


@pytest.mark.parametrize(("scale_codebook", "peak"), [("e4m3", 448.0), ("dynamic8", 1.0)])
def test_quantize_absmax_ties(triton_ops, scale_codebook, peak):
    table = SCALE_CODEBOOKS[scale_codebook]
    absmax = scale_ties(table, peak)
    assert_quantize_absmax_equals_reference(triton_ops, absmax, table, scale_codebook == "e4m3", "ties")


@pytest.mark.parametrize(
    ("places", "mean"),
    [((10, 258, 259), 0.0), ((0, 1, 2), 0.0), ((0, 2, 1), 1.0)],
)
def test_superblocks_are_summed_in_order(triton_ops, places, mean):
    """2^100, 1 and -2^100 in three superblocks: 1 is lost unless it comes last."""
    absmax = torch.zeros(260 if max(places) > 2 else 3, 256)
    for place, value in zip(places, (2.0**100, 1.0, -(2.0**100))):
        absmax[place, 5] = value
    _, _, offset = triton_ops.ops.quantize_absmax(*triton_ops.move((absmax, SCALE_CODEBOOKS["e4m3"])), True)
    assert offset.item() == torch.tensor(mean / absmax.numel()).item()
    assert_quantize_absmax_equals_reference(triton_ops, absmax, SCALE_CODEBOOKS["e4m3"], True, f"{places}")


def test_indices_past_2_to_the_32(interpreter):
    """The last program of a weight most of which is never touched; and the last superblock of its scales."""
    from support.triton_interpreter import only_program

    numel = 2**32 + 1000
    weight, part = untouched(numel, torch.bfloat16).view(1, -1), slice(2**32, numel)
    weight[0, part] = cases.weight(1, 1000, torch.bfloat16)[0]
    code = DEFAULT.code.clone()
    torch.use_deterministic_algorithms(False)  # its poison would touch all of the output
    with only_program(2**32 // 4096):
        packed, absmax = interpreter.ops.quantize(weight, code, 64)
    expected_packed, expected_absmax = reference.quantize(weight[:, part], code, 64)
    assert_same_bits(packed.view(-1)[2**31 :], expected_packed.view(-1), "far packed")
    assert_same_bits(absmax[2**32 // 64 :], expected_absmax.view(-1), "far absmax")
