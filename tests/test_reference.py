"""The reference against `oracle.py`, an independent element-by-element reading of the format."""

import ast
import itertools

import numpy as np
import pytest
import torch
from support import cases, oracle, special
from support.cases import DEFAULT, Layout, shape_id
from support.numerics import assert_same_bits
from support.paths import ROOT

from nf4kernels import reference
from nf4kernels.codebook import SCALE_CODEBOOKS

SHAPES = ((1, 1), (3, 5), (5, 63), (4, 96), (7, 100), (33, 65), (2, 1090))
LAYOUTS = (
    DEFAULT,
    Layout(32, "int4", "dynamic8"),
    Layout(128, "fp4", "e4m3"),
    Layout(32, "custom", None),
    Layout(64, "af4", "dynamic8"),
)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_quantize(shape, layout):
    w = cases.weight(*shape)
    packed, absmax = reference.quantize(w, layout.code, layout.block_size)
    nibbles, scales = oracle.encode(w.numpy().ravel(), layout.code.numpy(), layout.block_size)
    code_of_zero = min(range(16), key=lambda i: (abs(layout.code[i].item()), layout.code[i].item(), i))
    assert packed.view(-1).tolist() == oracle.pack(nibbles, code_of_zero).tolist()
    assert absmax.view(-1).tolist() == [float(s) for s in scales]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dequantize(layout):
    for shape in SHAPES:
        qweight = cases.random_bytes(*shape, layout)
        count = shape[0] * shape[1]
        tensors = [None if t is None else t.numpy().ravel() for t in qweight.op_args()[:6]]
        if layout.scale_codebook:
            tensors[3] = tensors[3][0]
        expected = oracle.decode(*tensors, count, layout.block_size)
        assert_same_bits(cases.dense(qweight).view(-1), torch.from_numpy(expected), f"dequantize {shape}")


@pytest.mark.parametrize("scale_codebook", ["e4m3", "dynamic8"])
@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 700])
def test_quantize_absmax(scale_codebook, blocks):
    table = SCALE_CODEBOOKS[scale_codebook]
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) ** 3
    got = reference.quantize_absmax(absmax, table, scale_codebook == "e4m3")
    expected = oracle.encode_scales(list(absmax.numpy()), table.numpy(), scale_codebook == "e4m3")
    assert got[0].tolist() == expected[0].tolist()
    assert got[1].tolist() == expected[1].tolist()
    assert got[2].item() == expected[2]


def test_quantize_absmax_at_ties_of_bf16_weights():
    table = SCALE_CODEBOOKS["e4m3"]
    groups = special.groups_at_a_tie()
    assert len(groups) >= 5
    for absmax in groups:
        expected, _, _ = oracle.encode_scales(list(absmax.numpy()), table.numpy(), True)
        assert reference.quantize_absmax(absmax, table, True)[0].tolist() == expected.tolist()


def quotients_of_numbers(source: str) -> list[str]:
    """Number / something with a name in it; 1 / t has one rounding, and what ints and floats alone give has, too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.left, ast.Constant):
            divisor = ast.unparse(node.right)
            is_number = divisor.startswith(("max(", "math.", "len(")) or not any(
                isinstance(inner, ast.Name) for inner in ast.walk(node.right)
            )
            if node.left.value != 1 and not is_number:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("folder", ["nf4kernels", "tests", "benchmarks"])
def test_no_number_is_divided_by_a_tensor(folder):
    """torch computes `448 / t` as `t.reciprocal() * 448`, two roundings; `t.new_tensor(448) / t` has one."""
    assert quotients_of_numbers("448 / scale") == ["448 / scale"]
    found = {
        str(file): quotients_of_numbers(file.read_text(encoding="utf-8")) for file in (ROOT / folder).rglob("*.py")
    }
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_quantize_absmax_sums_in_fp64_by_superblock():
    # In fp32 the sum of these overflows; 1e38 is not representable exactly, its mean is itself.
    absmax = torch.full((1000,), 1e38)
    _, scale_absmax, offset = reference.quantize_absmax(absmax, SCALE_CODEBOOKS["e4m3"], True)
    assert offset == absmax[0]
    assert torch.equal(scale_absmax, torch.zeros(4))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_encoded_values_are_the_nearest_level(layout):
    """Independent of any formula: no other level of the codebook would be nearer in fp64, but for one fp32 rounding."""
    w = cases.weight(16, 256)
    qweight = cases.quantized(16, 256, Layout(layout.block_size, layout.codebook, None))
    normalised = w.double().view(-1, layout.block_size) / qweight.absmax.double().view(-1, 1)
    distance = (normalised[..., None] - layout.code.double()).abs()
    flat = qweight.packed.view(-1)
    nibbles = torch.stack([flat >> 4, flat & 15], 1).view(-1, layout.block_size)
    chosen = distance.gather(2, nibbles[..., None].long())[..., 0]
    assert (chosen <= distance.min(2).values + 2.0**-22).all()  # values in [-1, 1]: two roundings of 2^-24, doubled


def test_oracle_e4m3_agrees_with_torch_on_a_dense_grid():
    """The two independent conversions; a tie at every midpoint between neighbours is in the grid."""
    positive = [oracle.e4m3_value(b) for b in range(0x7F)]
    midpoints = [(a + b) / 2 for a, b in itertools.pairwise(positive)]
    grid = np.array(positive + midpoints + [m * (1 + 2.0**-20) for m in midpoints], dtype=np.float32)
    grid = np.concatenate([grid, -grid])
    torch_bits = torch.from_numpy(grid).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert torch_bits == [oracle.e4m3_nearest(v) for v in grid]
