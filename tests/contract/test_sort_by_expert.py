"""sort_by_expert: each choice's row, sorted by expert and stable, and the rows themselves; the same on every way."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, dtype_id
from support.guarded import guarded
from support.numerics import assert_same_bits

INTERPRETED = ((3, 2, 4), (0, 2, 4), (2, 0, 3))  # torch sorts there, and a program takes a millisecond
# T, k, E: one token; none; chunks of 256 choices that are full, one short and one over; fewer experts than a chunk has
# threads and more; experts without a choice.
CASES = ((1, 2, 8), (1, 8, 128), (0, 2, 4), (3, 0, 4), (32, 8, 3), (51, 5, 7), (257, 1, 1), (90, 3, 300), (200, 4, 16))


def choices(T, k, E, seed=0):
    """Some of none, some experts more than others, an expert twice for a token."""
    drawn = torch.rand(T, k, generator=torch.Generator().manual_seed(seed)).pow(2) * (E + 1)
    return drawn.long()


def expected(index, E):
    """(offsets, positions) by a loop."""
    order = sorted(range(index.numel()), key=lambda i: (index.view(-1)[i].item(), i))
    positions = torch.empty(index.numel(), dtype=torch.int32)
    for row, choice in enumerate(order):
        positions[choice] = row if index.view(-1)[choice] < E else ~row
    counts = torch.bincount(index.view(-1), minlength=E + 1)[:E]
    return counts.cumsum(0).to(torch.int32), positions.view(index.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_is_a_stable_sort(way, dtype):
    for case in INTERPRETED if way.name == "interpreter" else CASES:
        T, k, E = case
        for H in (16, 13) if dtype == torch.bfloat16 else (9,):
            x, index = cases.activations(T, H, dtype), choices(T, k, E)
            rows, offsets, positions = way.run("sort_by_expert", x, index, E)
            for actual, ours in zip((offsets, positions), expected(index, E)):
                assert actual.dtype == torch.int32
                assert torch.equal(actual, ours)
            assert (rows.shape, rows.dtype) == ((T * k, H), dtype)
            for t in range(T):
                for position in positions[t].tolist():
                    wanted = x[t] if position >= 0 else torch.zeros_like(x[t])
                    assert_same_bits(rows[max(position, ~position)], wanted, f"{way} {case}")
        if way.name == "executor" and T * k > 0:
            assert {"count_kernel", "scan_kernel", "place_kernel"} <= {n.split("::")[-1] for n in way.kernel_names()}


def test_any_strides_and_addresses(way):
    """A CUDA kernel takes 8 columns a thread where pointers are aligned."""
    x, index = cases.activations(6, 16, torch.bfloat16), choices(6, 2, 3)
    plain = way.run("sort_by_expert", x, index, 3)
    moved = torch.empty(97, dtype=x.dtype)[1:].view(6, 16).copy_(x)
    for tokens in (x.T.contiguous().T, torch.cat([x, x], 1)[:, 16:], moved):
        for ours, theirs in zip(way.run("sort_by_expert", tokens, index.T.contiguous().T, 3), plain):
            assert torch.equal(ours, theirs)


def test_no_schedule_changes_it(way):
    T = way.pick((3000,), (30,))[0]
    x, index = cases.activations(T, 8, torch.bfloat16), choices(T, 2, 5)
    first = way.run("sort_by_expert", x, index, 5)
    for schedule in way.schedules():
        for again, before in zip(way.run("sort_by_expert", x, index, 5), first):
            assert torch.equal(again, before), schedule


@pytest.mark.ways("cpu", "executor", "interpreter")
@pytest.mark.parametrize("bad", [-1, 4, 2**33])
def test_an_index_out_of_range_is_an_error(way, bad):
    index = choices(9, 2, 3).clamp(max=2)
    index[4, 1] = bad
    with pytest.raises(RuntimeError, match=r"sort_by_expert: .*top_k_index must be in 0\.\."):
        way.run("sort_by_expert", cases.activations(9, 8, torch.float32), index, 3)


@pytest.mark.ways("cpu", "executor")
@pytest.mark.parametrize("at_end", [True, False], ids=["after-the-end", "before-the-start"])
def test_nothing_outside_of_a_tensor_is_read(way, at_end):
    x, index = cases.activations(5, 8, torch.bfloat16), choices(5, 3, 4)
    expected_rows = way.run("sort_by_expert", x, index, 4)[0]
    rows = way.ops.sort_by_expert(guarded(x, at_end), guarded(index, at_end), 4)[0]
    assert_same_bits(rows, expected_rows, f"{way}")
