"""grouped_lora_inner: each expert's rows of x times its factor, summed in fp32 and rounded once."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, dtype_id
from support.experts import offsets_of, rows_of
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits

COUNTS = ((0, 3, 0, 17, 5, 0), (0, 70), (1,) * 9, (9,))
# D, r: tails of the lanes, of the tiles of 4 rows and 4 ranks, of a mma; r more than a tile; one element.
CPU_SHAPES = ((64, 16), (100, 5), (31, 1), (1, 3), (257, 40), (96, 8))
DEVICE_SHAPES = ((64, 16), (100, 5), (72, 40))


def shapes(way):
    return CPU_SHAPES if way.is_compiled else DEVICE_SHAPES


def inputs(counts, unused, D, r, dtype, mean=0.0):
    E = len(counts)
    x = cases.activations(sum(counts) + unused, D, dtype, mean)
    return x, cases.activations(E * r, D, dtype, seed=1).view(E, r, D)


def run(way, x, counts, factors, transposed=False):
    """factors [E, r, D] in either case."""
    given = factors.mT.contiguous() if transposed else factors
    return way.run("grouped_lora_inner", x, offsets_of(counts), given, transposed)


def assert_right(P, x, counts, factors, what):
    assert P.shape == (len(x), factors.shape[1])
    for expert, rows in rows_of(counts):
        assert_product_within_bound(P[rows], x[rows], factors[expert].float().T, f"{what} expert {expert}")
    assert torch.equal(P[sum(counts) :], torch.zeros_like(P[sum(counts) :]))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_shape(way, counts, dtype):
    for shape in shapes(way):
        x, factors = inputs(counts, 3, *shape, dtype, 1.0)
        for transposed in (False, True):
            P = run(way, x, counts, factors, transposed)
            assert_right(P, x, counts, factors, f"{way} {shape} transposed={transposed}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_long_depth_with_a_mean(way, dtype):
    """More than one run of 512 terms, the last one short, for few rows and for many."""
    D = way.pick(16 * 1024 + 40, 2048 + 40)
    x, factors = inputs((3, 18), 0, D, 4, dtype, 1.0)
    for transposed in (False, True):
        assert_right(run(way, x, (3, 18), factors, transposed), x, (3, 18), factors, f"{way}")


@pytest.mark.ways("cpu")
def test_a_depth_of_more_parts_than_one_sum_takes(way):
    """The packed factor is summed in parts of 256 columns, of which 512 meet in one sum."""
    for D in (512 * 256, 512 * 256 + 1, 2 * 512 * 256 + 3):
        x, factors = inputs((2,), 0, D, 2, torch.float32, 1.0)
        assert_right(run(way, x, (2,), factors, True), x, (2,), factors, f"{way} {D}")


def test_a_row_sees_neither_other_rows_nor_other_experts(way):
    counts = (5, 0, 9)
    for dtype in way.pick(DTYPES, (torch.bfloat16,)):
        x, factors = inputs(counts, 2, 72, 8, dtype)
        for transposed in (False, True):
            clean = run(way, x, counts, factors, transposed)
            others, poisoned = x.clone(), factors.clone()
            others[[4, 9, 15]] = torch.nan
            P, keep = run(way, others, counts, factors, transposed), torch.arange(16) % 5 != 4
            assert P[[4, 9]].isnan().all()
            keep[14:] = True
            assert_same_bits(P[keep], clean[keep], f"{way} beside NaN")
            poisoned[:2] = torch.nan
            P = run(way, x, counts, poisoned, transposed)
            assert P[:5].isnan().all()
            assert_same_bits(P[5:], clean[5:], f"{way} the third expert's rows")


def test_bits_depend_on_no_schedule(way):
    for D, r in way.pick(((2000, 16),), ((264, 16),)):
        x, factors = inputs((3, 70, 0, 200), 0, D, r, torch.bfloat16)
        for transposed in (False, True):
            first = run(way, x, (3, 70, 0, 200), factors, transposed)
            for schedule in way.schedules():
                again = run(way, x, (3, 70, 0, 200), factors, transposed)
                assert_same_bits(again, first, f"{way} {schedule}")


def test_strides_of_x(way):
    counts = (2, 0, 7)
    x, factors = inputs(counts, 0, 72, 8, torch.bfloat16)
    for strided in (x.T.contiguous().T, torch.cat([x, x], 1)[:, 72:], x[:1].expand(9, 72)):
        expected = run(way, strided.contiguous(), counts, factors)
        assert_same_bits(run(way, strided, counts, factors), expected, f"{way}")


def test_empty(way):
    for counts, unused, D, r in (((), 3, 8, 4), ((0, 0), 0, 8, 4), ((3,), 1, 8, 0), ((3,), 1, 0, 4)):
        x, factors = inputs(counts, unused, D, r, torch.bfloat16)
        factors = torch.zeros(len(counts), r, D, dtype=torch.bfloat16) if not factors.numel() else factors
        for transposed in (False, True):
            P = way.run("grouped_lora_inner", x, torch.tensor(counts, dtype=torch.int32).cumsum(0).int(),
                        factors.mT.contiguous() if transposed else factors, transposed)  # fmt: skip
            assert torch.equal(P, torch.zeros(len(x), r, dtype=torch.bfloat16))


@pytest.mark.ways("executor", "cuda", "interpreter", "triton")
def test_offsets_that_fall_or_exceed_the_rows(way):
    x, factors = inputs((4, 0, 8), 0, 72, 8, torch.bfloat16)
    for transposed in (False, True):
        given = factors.mT.contiguous() if transposed else factors
        offsets = torch.tensor((4, 2, 30), dtype=torch.int32)
        P = way.run("grouped_lora_inner", x, offsets, given, transposed)
        assert_right(P, x, (4, 0, 8), factors, f"{way}")


@pytest.mark.ways("executor")
@pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
def test_nothing_outside_of_a_tensor_is_read(way, at_end):
    for D, r in ((72, 8), (80, 17)):
        x, factors = inputs((1, 0, 16), 1, D, r, torch.bfloat16)
        for transposed in (False, True):
            tensors = x, offsets_of((1, 0, 16)), factors.mT.contiguous() if transposed else factors
            fenced = [guarded(t, at_end) if t.nbytes % 16 == 0 else t for t in tensors]
            expected = way.run("grouped_lora_inner", *tensors, transposed)
            assert_same_bits(way.run("grouped_lora_inner", *fenced, transposed), expected, f"{way} {D} {r}")
