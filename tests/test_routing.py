"""nf4kernels.routing: sort_by_expert and combine_experts, their gradients of every kind, and what they refuse."""

import pytest
import torch
from support.cases import DTYPES, dtype_id

from nf4kernels.routing import combine_experts, sort_by_expert

T, K, H, E = 9, 2, 6, 4
INDEX = torch.randint(0, E + 1, (T, K), generator=torch.Generator().manual_seed(3))


def by_indexing(x, weights, scale):
    """The chain in plain torch: each choice's row times its expert's factor, weighted and summed; none counts for 0."""
    rows = x[:, None].expand(T, K, H) * scale[INDEX.clamp(max=E - 1)][..., None]
    return (torch.where(INDEX[..., None] < E, rows * weights[..., None], 0)).sum(1)


def by_routing(x, weights, scale):
    rows, offsets, positions = sort_by_expert(x, INDEX, E)
    own = torch.searchsorted(offsets, torch.arange(T * K, dtype=torch.int32), right=True).clamp(max=E - 1)
    return combine_experts(rows * scale[own][:, None], positions, weights)


def leaves(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((T, H), (T, K), (E,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_value_and_gradients(isa, dtype):
    ours, theirs = leaves(dtype), [leaf.double() for leaf in leaves(dtype)]
    for chain in (ours, theirs):
        for leaf in chain:
            leaf.requires_grad_()
    y, exact = by_routing(*ours), by_indexing(*theirs)
    dy = torch.randn(T, H).to(dtype)
    gradients = torch.autograd.grad(y, ours, dy)
    expected = torch.autograd.grad(exact, theirs, dy.double())
    for actual, wanted, like in zip((y, *gradients), (exact, *expected), (y, *ours)):
        assert actual.dtype == like.dtype
        assert (actual.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm(), isa


def test_second_derivatives_and_transforms():
    """By torch.func, a recorded backward and forward mode, the same numbers."""
    arguments = leaves()

    def loss(*values):
        return by_routing(*values).tanh().square().sum()

    def plain(*values):
        return by_indexing(*values).tanh().square().sum()

    each = (0, 1, 2)
    for ours, theirs in zip(torch.func.grad(loss, each)(*arguments), torch.func.grad(plain, each)(*arguments)):
        torch.testing.assert_close(ours, theirs)
    recorded = [leaf.clone().requires_grad_() for leaf in arguments]
    first = torch.autograd.grad(loss(*recorded), recorded, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), recorded)
    wanted = torch.autograd.grad(plain(*recorded), recorded, create_graph=True)
    wanted = torch.autograd.grad(sum(g.square().sum() for g in wanted), recorded)
    for ours, theirs in zip(second, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    tangents = tuple(map(torch.ones_like, arguments))
    torch.testing.assert_close(
        torch.func.jvp(by_routing, tuple(arguments), tangents), torch.func.jvp(by_indexing, tuple(arguments), tangents)
    )
    batch = torch.stack([arguments[0], 2 * arguments[0]])
    batched = torch.func.vmap(lambda x: by_routing(x, *arguments[1:]))(batch)
    torch.testing.assert_close(batched[1], by_indexing(batch[1], *arguments[1:]))


def test_compiles_in_one_graph():
    arguments = [leaf.requires_grad_() for leaf in leaves()]
    compiled = torch.compile(by_routing, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(by_routing(*arguments).sum(), arguments)
    for ours, theirs in zip(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected):
        torch.testing.assert_close(ours, theirs)


def test_only_what_needs_a_gradient_is_saved():
    rows, _, positions = sort_by_expert(torch.randn(T, H), INDEX, E)
    y = combine_experts(rows.requires_grad_(), positions, torch.rand(T, K))
    assert sum(t is not None and t.shape == rows.shape for t in y.grad_fn.saved_tensors) == 0
    assert sort_by_expert(torch.randn(T, H, requires_grad=True), INDEX, E)[1].grad_fn is None


X, WEIGHTS = torch.randn(T, H), torch.rand(T, K)
ROWS, _, POSITIONS = sort_by_expert(X, INDEX, E)
BAD = {
    "x-dtype": (sort_by_expert, (X.double(), INDEX, E), TypeError, "x must be float32, bfloat16 or float16"),
    "index-float": (sort_by_expert, (X, INDEX.float(), E), TypeError, "top_k_index must be integers"),
    "index-shape": (sort_by_expert, (X, INDEX[1:], E), ValueError, r"\[T, H\] and \[T, k\], got \[9, 6\] and \[8, 2\]"),
    "index-device": (sort_by_expert, (X, INDEX.to("meta"), E), ValueError, "top_k_index must be on cpu"),
    "rows-dtype": (combine_experts, (ROWS.double(), POSITIONS), TypeError, "rows must be float32"),
    "rows-shape": (combine_experts, (ROWS[1:], POSITIONS), ValueError, r"\[T \* k, H\] and \[T, k\], got \[17, 6\]"),
    "positions-dtype": (combine_experts, (ROWS, POSITIONS.long()), TypeError, "positions must be int32"),
    "positions-device": (combine_experts, (ROWS, POSITIONS.to("meta")), ValueError, "positions must be on cpu"),
    "weights-shape": (
        combine_experts,
        (ROWS, POSITIONS, WEIGHTS[:, :1]),
        ValueError,
        r"weights must have shape \[9, 2\]",
    ),
}


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD.values(), ids=BAD)
def test_refuses(function, arguments, error, message):
    with pytest.raises(error, match=f"^nf4kernels.{function.__name__}: .*{message}"):
        function(*arguments)
