"""The published 4-bit formats on every op and way: blocks of 16, levels beyond [-1, 1], and each kind of scales."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, FORMATS
from support.experts import assert_right, offsets_of
from support.numerics import assert_product_within_bound, assert_same_bits

formats = pytest.mark.parametrize("layout", FORMATS, ids=str)


def dtypes_of(way, op):
    """bf16 alone where kernels are interpreted: what a format changes lies before the products of any dtype."""
    return (torch.bfloat16,) if way.name == "interpreter" else way.dtypes(op)


@formats
def test_dequantize_is_the_reference(way, layout):
    """Of any bytes: every code of a scale, NaN included; ranges that begin and end inside a block and a byte."""
    for N, K in way.pick(((64, 96), (37, 100), (3, 8191), (9, 31), (2, 48)), ((37, 100), (6, 1056))):
        qweight = cases.random_bytes(N, K, layout)
        for dtype in DTYPES:
            dense = cases.dense(qweight, dtype)
            for rows, cols in (((0, N), (0, K)), ((1, N), (7, K - 5)), ((1, 2), (15, 33 if K > 33 else K))):
                part = way.run("dequantize", *qweight.op_args(), *rows, *cols, dtype)
                assert_same_bits(part, dense[slice(*rows), slice(*cols)], f"{way} {layout} {N}x{K} {rows} {cols}")


class ProductsOfFormats:
    op: str
    is_dgrad: bool

    # Around 128, 64 and 32 columns of kernels, blocks that straddle rows, a depth of more than one slice, odd K.
    every = ((40, 320), (33, 192), (37, 100), (64, 96), (300, 64), (20, 1088), (5, 63))
    few = ((40, 192), (37, 100))

    @pytest.mark.every_kernel
    @formats
    def test_within_the_bound(self, way, layout):
        for N, K in way.fitting(self.op, *way.pick(self.every, self.few)):
            qweight = cases.quantized(N, K, layout)
            dense = cases.dense(qweight)
            matrix = dense if self.is_dgrad else dense.T
            for dtype in dtypes_of(way, self.op):
                for M in way.pick((1, 3, 4, 5, 18, 40), way.few_rows(self.op)[-1:]):
                    a = cases.activations(M, len(matrix), dtype, mean=float(M % 2))
                    y = way.run(self.op, a, *qweight.op_args(), *(() if self.is_dgrad else (None,)))
                    assert_product_within_bound(y, a, matrix, f"{self.op} {way} {layout}")
        way.assert_ran(self.op)

    @formats
    def test_with_a_lora_term(self, way, layout):
        """Which meets sums whose order of columns depends on the weights that share a scale."""
        qweight = cases.quantized(40, 192, layout)
        dense = cases.dense(qweight)
        matrix = dense if self.is_dgrad else dense.T
        for M in way.pick((2, 19), (19,)):
            a, inner = cases.activations(M, len(matrix), torch.bfloat16), cases.activations(M, 5, torch.bfloat16)
            factor = cases.activations(5, matrix.shape[1], torch.bfloat16)
            term = (inner, factor, 1.5) if self.is_dgrad else (None, inner, factor.T.contiguous(), 1.5)
            y = way.run(self.op, a, *qweight.op_args(), *term)
            whole = torch.cat([a, inner], 1), torch.cat([matrix, 1.5 * factor.float()])
            assert_product_within_bound(y, *whole, f"{self.op} {way} {layout} with LoRA")


class TestLinear(ProductsOfFormats):
    op, is_dgrad = "linear", False


class TestLinearDgrad(ProductsOfFormats):
    op, is_dgrad = "linear_dgrad", True


class GroupedProductsOfFormats:
    op: str

    @pytest.mark.every_kernel
    @formats
    def test_each_expert_by_its_own_scales(self, way, layout):
        """Where codes alone are scales, each expert has a scale_code of its own."""
        counts = way.pick((3, 0, 9, 20), (3, 0, 9))
        qweights = cases.quantized_experts(len(counts), 40, 128, layout)
        for dtype in dtypes_of(way, self.op):
            a = cases.activations(sum(counts) + 2, 40 if self.op.endswith("dgrad") else 128, dtype)
            y = way.run(self.op, a, offsets_of(counts), *qweights.op_args())
            assert_right(y, self.op, a, counts, qweights, f"{way} {layout}")
        way.assert_ran(self.op)


class TestGroupedLinear(GroupedProductsOfFormats):
    op = "grouped_linear"


class TestGroupedLinearDgrad(GroupedProductsOfFormats):
    op = "grouped_linear_dgrad"
