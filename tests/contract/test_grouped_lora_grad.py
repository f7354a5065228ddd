"""grouped_lora_grad: scaling * small.T @ wide of each expert's rows, summed in fp32 and rounded once."""

import math

import pytest
import torch
from support import cases
from support.cases import DTYPES, dtype_id
from support.experts import offsets_of, rows_of
from support.guarded import guarded
from support.numerics import assert_product_within_bound, assert_same_bits

SCALING = 1.75
COUNTS = ((0, 3, 0, 17, 5, 0), (0, 70), (1,) * 9, (65, 0, 200))
# r, C: one element; tails of every tile; more ranks than a pass takes; C % 8 != 0.
CPU_SHAPES = ((16, 64), (5, 33), (1, 1), (70, 40), (8, 100))
DEVICE_SHAPES = ((16, 72), (5, 33), (40, 64))


def shapes(way):
    return CPU_SHAPES if way.is_compiled else DEVICE_SHAPES


def inputs(counts, unused, r, C, dtype, mean=0.0):
    T = sum(counts) + unused
    return cases.activations(T, r, dtype, mean, seed=1), cases.activations(T, C, dtype, mean, seed=2)


def run(way, small, wide, counts, dtype, transposed=False):
    return way.run("grouped_lora_grad", small, wide, offsets_of(counts), SCALING, dtype, transposed)


def assert_right(grad, small, wide, counts, what):
    assert grad.shape == (len(counts), small.shape[1], wide.shape[1])
    for expert, rows in rows_of(counts):
        if not counts[expert]:
            assert torch.equal(grad[expert], torch.zeros_like(grad[expert])), f"{what}: expert {expert} has no rows"
            continue
        matrix = SCALING * wide[rows].float()
        assert_product_within_bound(grad[expert], small[rows].T.contiguous(), matrix, f"{what} expert {expert}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_shape(way, counts, dtype):
    """Rows of no expert are in no sum, whatever they hold."""
    for shape in shapes(way):
        small, wide = inputs(counts, 3, *shape, dtype, 1.0)
        small[sum(counts) :] = wide[sum(counts) :] = torch.nan
        grad = run(way, small, wide, counts, dtype)
        assert_right(grad, small, wide, counts, f"{way} {shape}")
        transposed = run(way, small, wide, counts, dtype, True)
        assert transposed.is_contiguous()
        assert_same_bits(transposed, grad.mT, f"{way} transposed")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_is_rounded_once_to_the_dtype_asked_for(way, dtype):
    """As test_lora_grad.py says of one expert's."""
    counts = (0, 9, 40)
    for shape in shapes(way):
        small, wide = inputs(counts, 0, *shape, dtype)
        full = run(way, small, wide, counts, torch.float32)
        for expert, rows in rows_of(counts):
            a, b = small[rows].double().T, wide[rows].double()
            steps = math.ceil(counts[expert] / 16) + 8 if dtype != torch.float32 else counts[expert]
            allowed = 2.0**-20 if way.is_compiled else (steps + 2) * 2.0**-22
            assert ((full[expert].double() - SCALING * a @ b).abs() <= allowed * SCALING * a.abs() @ b.abs()).all()
        for out_dtype in DTYPES:
            assert_same_bits(run(way, small, wide, counts, out_dtype), full.to(out_dtype), f"{way}")


@pytest.mark.ways("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_bits_of_lora_grad_of_each_expert(way, dtype):
    counts = (0, 3, 65, 1, 0, 300)
    small, wide = inputs(counts, 2, 16, 100, dtype)
    grad = run(way, small, wide, counts, torch.float32)
    for expert, rows in rows_of(counts):
        alone = way.run("lora_grad", small[rows], wide[rows], SCALING, torch.float32)
        assert_same_bits(grad[expert], alone, f"{way} expert {expert}")


def test_nan_stays_with_its_expert(way):
    counts = (3, 5, 4)
    small, wide = inputs(counts, 0, 6, 40, torch.bfloat16)
    clean = run(way, small, wide, counts, torch.float32)
    for tensor in (small, wide):
        before, tensor[4, 2] = tensor[4, 2].item(), torch.nan
        grad = run(way, small, wide, counts, torch.float32)
        struck = grad[1, 2] if tensor is small else grad[1, :, 2]
        assert struck.isnan().all()
        assert grad.isnan().sum() == struck.numel()
        assert_same_bits(grad[[0, 2]], clean[[0, 2]], f"{way} the other experts")
        tensor[4, 2] = before


def test_bits_depend_on_no_schedule(way):
    counts = (3, 70, 0, 30)
    for shape in way.pick(((16, 2000),), ((17, 136),)):
        small, wide = inputs(counts, 0, *shape, torch.bfloat16)
        first = run(way, small, wide, counts, torch.float32)
        for schedule in way.schedules():
            assert_same_bits(run(way, small, wide, counts, torch.float32), first, f"{way} {schedule}")


def test_strides_of_wide(way):
    counts = (2, 0, 7)
    small, wide = inputs(counts, 0, 8, 72, torch.bfloat16)
    for strided in (wide.T.contiguous().T, torch.cat([wide, wide], 1)[:, 72:], wide[:1].expand(9, 72)):
        expected = run(way, small, strided.contiguous(), counts, torch.float32)
        grad = run(way, small, strided, counts, torch.float32)
        assert ((grad - expected).abs() <= 2.0**-18 * expected.abs().max()).all()


def test_empty(way):
    for counts, unused, r, C in (((), 3, 4, 8), ((0, 0), 0, 4, 8), ((3,), 1, 0, 8), ((3,), 1, 4, 0)):
        small, wide = inputs(counts, unused, r, C, torch.bfloat16)
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0).int()
        for transposed in (False, True):
            grad = way.run("grouped_lora_grad", small, wide, ends, SCALING, torch.float32, transposed)
            assert torch.equal(grad, torch.zeros(len(counts), *((C, r) if transposed else (r, C))))


@pytest.mark.ways("executor", "cuda", "interpreter", "triton")
def test_offsets_that_fall_or_exceed_the_rows(way):
    small, wide = inputs((4, 0, 8), 0, 8, 72, torch.bfloat16)
    offsets = torch.tensor((4, 2, 30), dtype=torch.int32)
    grad = way.run("grouped_lora_grad", small, wide, offsets, SCALING, torch.bfloat16)
    assert_right(grad, small, wide, (4, 0, 8), f"{way}")


@pytest.mark.ways("executor")
@pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
def test_nothing_outside_of_a_tensor_is_read(way, at_end):
    counts = (1, 0, 16)
    for r, C in ((8, 72), (16, 64), (3, 8)):
        tensors = *inputs(counts, 1, r, C, torch.bfloat16), offsets_of(counts)
        fenced = [guarded(t, at_end) if t.nbytes % 16 == 0 else t for t in tensors]
        expected = way.run("grouped_lora_grad", *tensors, 1.0, torch.float32)
        assert_same_bits(way.run("grouped_lora_grad", *fenced, 1.0, torch.float32), expected, f"{way} {r} {C}")
