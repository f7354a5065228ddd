"""Parts of a 4-bit weight for ranks: every kind of scales, cut both ways, has the whole weight's bits."""

import pytest
import torch
from support.numerics import assert_same_bits

import nf4kernels as nf4
from nf4kernels.distributed import cutting
from nf4kernels.distributed.cutting import COLUMNS, ROWS

KINDS = {
    "double": {},
    "dynamic8": {"scale_codebook": "dynamic8"},
    "float32": {"double_quant": False},
    "codes of 32": {"codebook": "mxfp4"},
    "codes of 16": {"codebook": "nvfp4"},
    "bfloat16": {"codebook": "int4_symmetric", "block_size": 64},
    "blocks of 128": {"block_size": 128},
}
# N, K, ranks, how many of the ranks' parts begin with a superblock. 256 blocks of 64 are 64 rows of 256 columns.
SHAPES = [(128, 256, 2), (192, 256, 2), (96, 512, 4), (64, 1024, 2), (8, 32768, 4), (6, 384, 3), (2, 128, 1)]


def weight(N, K, **options):
    torch.manual_seed(N + K)
    return nf4.quantize(torch.randn(N, K, dtype=torch.bfloat16) * torch.rand(N, 1, dtype=torch.bfloat16), **options)


@pytest.mark.parametrize("dim", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_bits_of_the_whole(kind, dim):
    cuts = 0
    for N, K, ranks in SHAPES:
        qweight = weight(N, K, **KINDS[kind])
        if cutting.cut_problem(N, K, qweight.block_size, ranks, dim) is not None:
            continue
        cuts += 1
        for dtype in (torch.float32, torch.bfloat16):
            parts = [nf4.dequantize(cutting.cut(qweight, dim, rank, ranks), dtype) for rank in range(ranks)]
            assert_same_bits(torch.cat(parts, dim), nf4.dequantize(qweight, dtype), f"{kind} {N}x{K} on {ranks}")
    assert cuts >= 5


def test_rows_keep_their_superblocks_where_these_begin_with_them():
    """And cost what they cost before; others, and all columns, hold fp32 numbers."""
    kept = [cutting.cut(weight(128, 256), ROWS, rank, 2) for rank in range(2)]
    assert [part.scales for part in kept] == ["double", "double"]
    assert [part.scale_absmax.numel() for part in kept] == [1, 1]
    decoded = [cutting.cut(weight(192, 256), ROWS, rank, 2) for rank in range(2)]  # 96 rows are one and a half
    assert [part.scales for part in decoded] == ["double", "float32"]
    assert [cutting.cut(weight(128, 256), COLUMNS, rank, 2).scales for rank in range(2)] == ["float32", "float32"]
    assert cutting.cut(weight(128, 256, codebook="mxfp4"), COLUMNS, 1, 2).scales == "codes"


def test_a_product_with_rows_has_the_bits_of_the_whole_product():
    qweight = weight(192, 256)
    for M in (1, 5, 40):
        x = torch.randn(M, 256, dtype=torch.bfloat16)
        parts = [nf4.linear(x, cutting.cut(qweight, ROWS, rank, 2)) for rank in range(2)]
        assert_same_bits(torch.cat(parts, 1), nf4.linear(x, qweight), f"M={M}")


def test_rows_of_a_weight_with_act_order():
    order = torch.randperm(128).int()
    qweight = nf4.quantized_weight.QuantizedWeight(
        **{**vars(weight(8, 128)), "column_order": order},
    )
    parts = [nf4.dequantize(cutting.cut(qweight, ROWS, rank, 2)) for rank in range(2)]
    assert_same_bits(torch.cat(parts), nf4.dequantize(qweight), "rows")
    with pytest.raises(ValueError, match="act-order"):
        cutting.cut(qweight, COLUMNS, 0, 2)


@pytest.mark.parametrize(
    ("shape", "ranks", "dim", "message"),
    [
        ((126, 128), 4, ROWS, r"out_features=126 must be the same on each of 4 ranks; 1, 2, 3, 6, .* would do"),
        ((64, 192), 2, COLUMNS, r"in_features=192 must be whole blocks of 64, .* on each of 2 ranks; 1, 3 would do"),
        ((64, 96), 2, COLUMNS, r"in_features=96 must be a multiple of block_size=64 for any cut"),
        ((64, 96), 2, ROWS, r"in_features=96 must be a multiple of block_size=64 for any cut"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_the_numbers(shape, ranks, dim, message):
    with pytest.raises(ValueError, match=message):
        cutting.cut(weight(*shape), dim, 0, ranks)
