"""What experts add to grouped_linear and its gradient: a bias of each, and LoRA's term of each."""

import pytest
import torch
from contract.product import SCALING, joined
from support import cases
from support.cases import DTYPES, Layout, dtype_id
from support.experts import offsets_of, rows_of
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits

from nf4kernels import quantize_experts

# No rows at either end and between; all in one; few rows of many experts; more rows than a tile.
COUNTS = ((0, 3, 0, 17, 8, 0), (0, 40), (1,) * 9, (70, 0, 130))
BFLOAT16 = torch.bfloat16


class GroupedTerms:
    op: str
    plain: str  # the product of one expert
    is_dgrad: bool

    def sizes(self, qweights):
        """(depth, columns)"""
        return qweights.shape[1:] if self.is_dgrad else qweights.shape[:0:-1]

    def inputs(self, T, qweights, r, dtype, mean=0.0):
        """(a [T, depth], bias [E, columns] or None, lora_inner [T, r], factors [E, r, columns])"""
        E, (depth, columns) = len(qweights), self.sizes(qweights)
        bias = None if self.is_dgrad else cases.activations(E, columns, dtype, seed=5)
        factors = cases.activations(E * r, columns, dtype, seed=4).view(E, r, columns)
        return cases.activations(T, depth, dtype, mean), bias, cases.activations(T, r, dtype, mean, seed=3), factors

    def arguments(self, a, bias, inner, factors, weight):
        if self.is_dgrad:
            return *weight, inner, factors, SCALING
        return *weight, bias, inner, None if factors is None else factors.mT.contiguous(), SCALING

    def run(self, way, a, bias, inner, factors, counts, qweights):
        return way.run(self.op, a, offsets_of(counts), *self.arguments(a, bias, inner, factors, qweights.op_args()))

    def run_plain(self, way, a, bias, inner, factor, qweight):
        return way.run(self.plain, a, *self.arguments(a, bias, inner, factor, qweight.op_args()))

    def assert_right(self, y, a, bias, inner, factors, counts, qweights, what):
        for expert, rows in rows_of(counts):
            w = cases.dense(qweights[expert])
            product = joined(a[rows], w if self.is_dgrad else w.T, (inner[rows], factors[expert], SCALING))
            of_expert = None if bias is None else bias[expert]
            assert_product_within_bound(y[rows], *product, f"{self.op} {what} expert {expert}", of_expert)
        assert torch.equal(y[sum(counts) :], torch.zeros_like(y[sum(counts) :])), "rows of no expert have no term"

    @pytest.mark.every_kernel
    @pytest.mark.parametrize("counts", COUNTS, ids=str)
    def test_every_kernel(self, way, counts):
        """Also with rows of no expert after the last."""
        qweights = cases.quantized_experts(
            len(counts), *((136, 192) if way.name in ("executor", "cuda") else (72, 128))
        )
        for dtype, configuration in way.configurations(self.op):
            if way.name == "interpreter" and dtype != BFLOAT16:
                continue  # every_rank has them, of fewer rows
            with configuration:
                inputs = self.inputs(sum(counts) + 5, qweights, 5, dtype, 1.0)
                self.assert_right(self.run(way, *inputs, counts, qweights), *inputs, counts, qweights, f"{way}")
        way.assert_ran(self.op)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("r", [1, 16, 17, 64])
    def test_every_rank(self, way, r, dtype):
        counts = (3, 0, 20)
        for shape, layout in way.pick(
            (((48, 256), Layout()), ((37, 512), Layout(32, "fp4", None))), (((40, 64), Layout()),)
        ):
            qweights = cases.quantized_experts(3, *shape, layout)
            inputs = self.inputs(25, qweights, r, dtype)
            self.assert_right(self.run(way, *inputs, counts, qweights), *inputs, counts, qweights, f"{way} r={r}")

    @pytest.mark.ways("cpu")
    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    def test_the_bits_of_the_product_of_each_expert(self, way, dtype):
        """With its terms."""
        counts = (0, 3, 17, 1, 0, 600)
        qweights = cases.quantized_experts(len(counts), 48, 128)
        a, bias, inner, factors = self.inputs(sum(counts), qweights, 5, dtype)
        y = self.run(way, a, bias, inner, factors, counts, qweights)
        for expert, rows in rows_of(counts):
            of_expert = None if bias is None else bias[expert]
            alone = self.run_plain(way, a[rows], of_expert, inner[rows], factors[expert], qweights[expert])
            assert_same_bits(y[rows], alone, f"{self.op} {way} expert {expert}")

    @pytest.mark.every_kernel
    def test_a_term_of_zeros_changes_no_bit(self, way):
        """A fresh adapter, and rank 0."""
        counts = (5, 0, 9)
        qweights = cases.quantized_experts(3, 40, 128)
        for dtype in way.dtypes(self.op):
            a, _, inner, factors = self.inputs(16, qweights, 4, dtype)
            plain = self.run(way, a, None, None, None, counts, qweights)
            for r in (0, 4):
                zeros = torch.zeros_like(factors[:, :r])
                y = self.run(way, a, None, inner[:, :r].contiguous(), zeros, counts, qweights)
                assert_same_bits(y, plain, f"{self.op} {way} r={r}")

    @pytest.mark.every_kernel
    def test_an_expert_does_not_see_the_others_terms(self, way):
        """Neither NaN in another row's inner product nor in another expert's factor or bias."""
        counts = (5, 0, 9)
        qweights = cases.quantized_experts(3, 40, 128)
        for dtype in way.dtypes(self.op):
            a, bias, inner, factors = self.inputs(16, qweights, 4, dtype)
            clean = self.run(way, a, bias, inner, factors, counts, qweights)
            beside = inner.clone()
            beside[[4, 13, 15]] = torch.nan
            y = self.run(way, a, bias, beside, factors, counts, qweights)
            keep = torch.ones(16, dtype=torch.bool)
            keep[[4, 13]] = False
            assert y[~keep].isnan().all()
            assert_same_bits(y[keep], clean[keep], f"{way} rows beside a NaN")
            for poisoned in (factors, bias):
                if poisoned is not None:
                    poisoned[:2] = torch.nan
            y = self.run(way, a, bias, inner, factors, counts, qweights)
            assert y[:5].isnan().all()
            assert_same_bits(y[5:], clean[5:], f"{way} the third expert's rows")

    @pytest.mark.every_kernel
    @pytest.mark.ways("executor", "cuda", "interpreter", "triton")
    def test_offsets_that_fall_or_exceed_the_rows(self, way):
        """Each row has the terms of the expert whose weight it has."""
        T, offsets = 12, torch.tensor((4, 2, 30), dtype=torch.int32)
        qweights = cases.quantized_experts(3, 40, 64)
        inputs = self.inputs(T, qweights, 4, BFLOAT16)
        y = way.run(self.op, inputs[0], offsets, *self.arguments(*inputs, qweights.op_args()))
        self.assert_right(y, *inputs, (4, 0, 8), qweights, f"{way}")

    @pytest.mark.ways("executor")
    @pytest.mark.every_kernel
    @pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
    def test_nothing_outside_of_a_tensor_is_read(self, way, at_end):
        for counts in ((1, 0, 16), (70,)):
            qweights = cases.quantized_experts(len(counts), 40, 128)
            inputs = self.inputs(sum(counts) + 1, qweights, 8, BFLOAT16)
            tensors = inputs[0], offsets_of(counts), *self.arguments(*inputs, qweights.op_args())
            fenced = [guarded(t, at_end) if isinstance(t, torch.Tensor) else t for t in tensors]
            assert_same_bits(way.run(self.op, *fenced), way.run(self.op, *tensors), f"{way} {counts}")

    def test_empty(self, way):
        """Where the product has no depth, its terms are all that there is."""
        for E, N, K, T in ((0, 8, 64, 3), (2, 0, 64, 3), (2, 8, 0, 3), (2, 8, 64, 0)):
            counts, qweights = (T, 0)[:E], quantize_experts(torch.randn(E, N, K))
            inputs = self.inputs(T, qweights, 4, BFLOAT16)
            y = way.run(self.op, inputs[0], torch.tensor(counts).cumsum(0).int(),
                        *self.arguments(*inputs, qweights.op_args()))  # fmt: skip
            assert y.shape == (T, self.sizes(qweights)[1])
            self.assert_right(y, *inputs, counts, qweights, f"{way}")


class TestGroupedLinear(GroupedTerms):
    op, plain, is_dgrad = "grouped_linear", "linear", False

    def test_a_bias_alone(self, way):
        counts = (2, 0, 7)
        qweights = cases.quantized_experts(3, 40, 128)
        for dtype in way.pick(DTYPES, (BFLOAT16,)):
            a, bias, *_ = self.inputs(11, qweights, 1, dtype)
            y = self.run(way, a, bias, None, None, counts, qweights)
            none = torch.zeros(11, 0, dtype=dtype), torch.zeros(3, 0, 40, dtype=dtype)
            self.assert_right(y, a, bias, *none, counts, qweights, f"{way}")


class TestGroupedLinearDgrad(GroupedTerms):
    op, plain, is_dgrad = "grouped_linear_dgrad", "linear_dgrad", True
