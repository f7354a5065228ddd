"""combine_experts and its gradients: sums over a token's choices in fp32, in their order, rounded once."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, dtype_id
from support.guarded import guarded
from support.numerics import assert_same_bits

from nf4kernels import reference

# T, k, H: columns that are no whole vector of any way; more than one block of a kernel; none.
SHAPES = ((1, 8, 72), (5, 2, 13), (7, 1, 64), (40, 4, 24), (3, 0, 8), (0, 2, 8), (4, 3, 0), (2, 2, 2100))
INTERPRETED = ((2, 2, 13), (0, 2, 8), (3, 0, 8), (1, 2, 1030))  # a program takes a millisecond


def shapes(way):
    return INTERPRETED if way.name == "interpreter" else SHAPES


def routed(T, k, E=4):
    """Positions, some of them of no expert."""
    index = torch.randint(0, E + 1, (T, k), generator=torch.Generator().manual_seed(T + k))
    return reference.expert_positions(index, E)[1]


def inputs(T, k, H, dtype):
    weights = torch.rand(T, k, generator=torch.Generator().manual_seed(2))
    return cases.activations(T * k, H, dtype), cases.activations(T, H, dtype, seed=1), routed(T, k), weights


def dtypes_of(dtype):
    """(of the result, of the weights): what a model has, and the other way round."""
    return ((dtype, dtype), (torch.float32, torch.float32), (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_combine(way, dtype):
    """The bits of a loop."""
    for shape in shapes(way):
        rows, _, positions, weights = inputs(*shape, dtype)
        for out_dtype, weights_dtype in dtypes_of(dtype):
            own = weights.to(weights_dtype)
            for given in (own, None):
                total = torch.zeros(shape[0], shape[2])
                for t in range(shape[0]):
                    for j, p in enumerate(positions[t].tolist()):
                        if p >= 0:
                            total[t] += (1 if given is None else given[t, j].float()) * rows[p].float()
                actual = way.run("combine_experts", rows, positions, given, out_dtype)
                assert_same_bits(actual, total.to(out_dtype), f"{way} {shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dgrad(way, dtype):
    for shape in shapes(way):
        _, dout, positions, weights = inputs(*shape, dtype)
        for out_dtype, weights_dtype in dtypes_of(dtype):
            own = weights.to(weights_dtype)
            for given in (own, None):
                drows = torch.full((shape[0] * shape[1], shape[2]), torch.nan)
                for t in range(shape[0]):
                    for j, p in enumerate(positions[t].tolist()):
                        factor = 0 if p < 0 else 1 if given is None else given[t, j].float()
                        drows[max(p, ~p)] = factor * dout[t].float()
                actual = way.run("combine_experts_dgrad", dout, positions, given, out_dtype)
                assert torch.equal(actual, drows.to(out_dtype)), f"{way} {shape}"  # zeros of either sign


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_wgrad(way, dtype):
    """Within fp32's error: every sum has at most 512 terms, and most have fewer than 70."""
    for shape in shapes(way):
        rows, dout, positions, _ = inputs(*shape, dtype)
        taken = torch.where(positions[..., None] < 0, 0, rows.double()[positions.clamp(min=0).long()])
        exact = (dout.double()[:, None] * taken).sum(-1)
        magnitude = (dout.double().abs()[:, None] * taken.abs()).sum(-1)
        actual = way.run("combine_experts_wgrad", dout, rows, positions, torch.float32)
        assert ((actual.double() - exact).abs() <= 2.0**-20 * magnitude).all()
        for out_dtype in DTYPES:
            rounded = way.run("combine_experts_wgrad", dout, rows, positions, out_dtype)
            assert_same_bits(rounded, actual.to(out_dtype), f"{way} {shape}")


def test_the_rows_of_no_expert_do_not_count(way):
    """Not even NaN in them, nor a NaN weight."""
    rows, dout, _, weights = inputs(6, 2, 16, torch.bfloat16)
    index = torch.tensor([[0, 2], [2, 2], [1, 0], [0, 1], [2, 1], [1, 1]])
    positions = reference.expert_positions(index, 2)[1]
    rows[positions[positions < 0].bitwise_not().long()] = torch.nan
    weights[index == 2] = torch.nan
    out = way.run("combine_experts", rows, positions, weights, torch.float32)
    assert out.isfinite().all()
    assert (out[1] == 0).all()
    drows = way.run("combine_experts_dgrad", dout, positions, weights, torch.float32)
    assert (drows[positions[positions < 0].bitwise_not().long()] == 0).all()
    assert drows.isfinite().all()
    dweights = way.run("combine_experts_wgrad", dout, rows, positions, torch.float32)
    assert (dweights[index == 2] == 0).all()
    assert (dweights[index != 2] != 0).all()


def test_any_strides_and_addresses(way):
    rows, dout, positions, weights = inputs(6, 2, 16, torch.bfloat16)
    moved = torch.empty(6 * 2 * 16 + 1, dtype=rows.dtype)[1:].view(12, 16).copy_(rows)
    plain = way.run("combine_experts", rows, positions, weights, torch.bfloat16)
    for other in (rows.T.contiguous().T, torch.cat([rows, rows], 1)[:, 16:], moved):
        strided = way.run(
            "combine_experts", other, positions.T.contiguous().T, weights.T.contiguous().T, torch.bfloat16
        )
        assert_same_bits(strided, plain, f"{way}")
    expanded = dout[:1].expand(6, 16)
    for op, more in (("combine_experts_dgrad", (positions, weights)), ("combine_experts_wgrad", (rows, positions))):
        actual = way.run(op, expanded, *more, torch.bfloat16)
        assert_same_bits(actual, way.run(op, expanded.contiguous(), *more, torch.bfloat16), f"{way} {op}")


def test_no_schedule_changes_the_bits(way):
    T = way.pick((4000,), (9,))[0]
    rows, dout, positions, weights = inputs(T, 4, 24, torch.bfloat16)
    calls = (
        ("combine_experts", (rows, positions, weights, torch.bfloat16)),
        ("combine_experts_dgrad", (dout, positions, weights, torch.bfloat16)),
        ("combine_experts_wgrad", (dout, rows, positions, torch.float32)),
    )
    first = [way.run(op, *arguments) for op, arguments in calls]
    for schedule in way.schedules():
        for (op, arguments), before in zip(calls, first):
            assert_same_bits(way.run(op, *arguments), before, f"{way} {schedule} {op}")


@pytest.mark.ways("cpu", "executor", "interpreter")
@pytest.mark.parametrize("other", [12, ~12, 2**31 - 1, "another's"])
def test_a_position_that_is_no_row_or_is_there_twice(way, other):
    """An error where the host reads it; elsewhere none, and nothing is read or written beyond the rows."""
    rows, dout, positions, weights = inputs(6, 2, 16, torch.bfloat16)
    positions[2, 1] = positions[0, 0] if other == "another's" else other
    calls = (
        ("combine_experts", (rows, positions, weights, torch.float32)),
        ("combine_experts_dgrad", (dout, positions, weights, torch.float32)),
        ("combine_experts_wgrad", (dout, rows, positions, torch.float32)),
    )
    for op, arguments in calls:
        if way.is_compiled:
            with pytest.raises(RuntimeError, match="positions must have each row below 12, or ~ of it, once, got"):
                way.run(op, *arguments)
        else:
            result = way.run(op, *arguments)
            assert op.endswith("dgrad") or result[2].isfinite().all()


@pytest.mark.ways("cpu", "executor")
@pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
def test_nothing_outside_of_a_tensor_is_read(way, at_end):
    for H in (16, 13):
        rows, dout, positions, weights = inputs(5, 3, H, torch.bfloat16)
        aligned = H == 16
        fenced = [
            guarded(t, at_end) if t.nbytes % 16 == 0 or not aligned else t for t in (rows, dout, positions, weights)
        ]
        for op, pick in (
            ("combine_experts", (0, 2, 3)),
            ("combine_experts_dgrad", (1, 2, 3)),
            ("combine_experts_wgrad", (1, 0, 2)),
        ):
            plain = getattr(way.ops, op)(*((rows, dout, positions, weights)[i] for i in pick), torch.float32)
            assert_same_bits(getattr(way.ops, op)(*(fenced[i] for i in pick), torch.float32), plain, op)
