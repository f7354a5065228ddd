"""The public grouped_linear: what it refuses, its gradient, and where it meets autocast and compile."""

import pytest
import torch
import torch._dynamo.testing
from support import cases
from support.cases import DTYPES, dtype_id, shape_id
from support.experts import offsets_of, rows_of

from nf4kernels import grouped_linear, linear, quantize_experts

W = torch.randn(3, 16, 64)
Q = quantize_experts(W)
X, OFFSETS = torch.randn(5, 64), torch.tensor([2, 2, 5], dtype=torch.int32)
BAD = {
    "weight-list": (quantize_experts, ([[[1.0]]],), TypeError, "weight must be a tensor, got list"),
    "weight-2d": (quantize_experts, (W[0],), ValueError, r"weight must be 3-D \[E, N, K\], got shape \[16, 64\]"),
    "weight-K": (quantize_experts, (W[..., :32],), ValueError, "K must be a multiple of 64 at block_size=64, got K=32"),
    "block_size-K": (quantize_experts, (W, "nf4", 128), ValueError, "K must be a multiple of 128 .*, got K=64"),
    "block_size": (quantize_experts, (W, "nf4", 48), ValueError, "block_size must be one of .* got 48"),
    "qweights": (grouped_linear, (X, OFFSETS, Q[0]), TypeError, "qweights must be a QuantizedExperts, got Quantized"),
    "x-list": (grouped_linear, ([1.0], OFFSETS, Q), TypeError, "x must be a tensor, got list"),
    "x-double": (grouped_linear, (X.double(), OFFSETS, Q), TypeError, "x must be float32.*, got torch.float64"),
    "x-columns": (grouped_linear, (X[:, 1:], OFFSETS, Q), ValueError, r"x must have K=64 columns, got shape \[5, 63\]"),
    "x-1d": (grouped_linear, (X[0], OFFSETS, Q), ValueError, r"x must be 2-D \[T, K\], got shape \[64\]"),
    "x-3d": (grouped_linear, (X[None], OFFSETS, Q), ValueError, r"x must be 2-D \[T, K\], got shape \[1, 5, 64\]"),
    "x-device": (grouped_linear, (X.to("meta"), OFFSETS, Q), ValueError, "x must be on cpu as the weight is, got meta"),
    "offsets-list": (grouped_linear, (X, [2, 2, 5], Q), TypeError, "expert_offsets must be an int32 tensor, got list"),
    "offsets-long": (grouped_linear, (X, OFFSETS.long(), Q), TypeError, "expert_offsets must be .* got torch.int64"),
    "offsets-E": (grouped_linear, (X, OFFSETS[1:], Q), ValueError, r"expert_offsets must have shape \[3\], got \[2\]"),
    "offsets-device": (grouped_linear, (X, OFFSETS.to("meta"), Q), ValueError, "expert_offsets must be on cpu .* meta"),
}


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD.values(), ids=BAD)
def test_refuses(function, arguments, error, message):
    with pytest.raises(error, match=f"^nf4kernels.{function.__name__}: {message}"):
        function(*arguments)


@pytest.mark.parametrize("ends", [(3, 2, 5), (-1, 2, 5), (2, 2, 6), (2, 2, 2**31 - 1)], ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_refuses_offsets_that_fall_or_exceed_the_rows(isa, ends, needs_grad):
    x = X.clone().requires_grad_(needs_grad)
    with pytest.raises(RuntimeError, match="expert_offsets must not fall and not exceed T=5, got"):
        grouped_linear(x, torch.tensor(ends, dtype=torch.int32), Q)
    with pytest.raises(TypeError, match="qweight must be a QuantizedWeight, got QuantizedExperts"):
        linear(X, Q)


@pytest.mark.parametrize("shape", [(0, 48, 128), (3, 0, 128), (3, 48, 0)], ids=shape_id)
def test_zero_sizes(isa, shape):
    E, N, K = shape
    qweights = quantize_experts(torch.randn(shape))
    assert [q.shape for q in qweights] == [(N, K)] * E
    offsets = torch.arange(1, E + 1, dtype=torch.int32)
    for T in (E, E + 2):
        x = torch.ones(T, K, requires_grad=True)
        y = grouped_linear(x, offsets, qweights)
        y.sum().backward()
        assert torch.equal(y, torch.zeros(T, N))
        assert torch.equal(x.grad, torch.zeros(T, K))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_is_that_of_the_dense_product(isa, dtype):
    """Each rounding of dx is of at most half an eps of its terms' magnitude: Ŵ's and its scale's, and the result's."""
    counts, T = (3, 0, 9), 14
    qweights = cases.quantized_experts(3, 48, 128)
    x = cases.activations(T, 128, dtype).requires_grad_()
    dy = cases.activations(T, 48, dtype, seed=3)
    y = grouped_linear(x, offsets_of(counts), qweights)
    y.backward(dy)
    op = torch.ops.nf4kernels.grouped_linear
    assert torch.equal(y.detach(), op(x.detach(), offsets_of(counts), *qweights.op_args()))
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad[12:], torch.zeros(2, 128, dtype=dtype))
    for e, rows in rows_of(counts):
        w = cases.dense(qweights[e]).double()
        exact = dy[rows].double() @ w
        allowed = 2 * torch.finfo(dtype).eps * (dy[rows].double().abs() @ w.abs())
        assert ((x.grad[rows].double() - exact).abs() <= allowed).all()


def test_gradcheck_by_finite_differences():
    """fp32 and linear in x: the quotient's only error is rounding, of each y by a sum of 64 terms."""
    counts = (2, 0, 3)
    qweights = cases.quantized_experts(3, 16, 64)
    x, dy = cases.activations(5, 64, torch.float32).requires_grad_(), torch.randn(5, 16)
    (grouped_linear(x, offsets_of(counts), qweights) * dy).sum().backward()
    direction = torch.randn(5, 64)
    with torch.no_grad():
        plus, minus = (grouped_linear(x + s * direction, offsets_of(counts), qweights) for s in (1, -1))
    quotient = ((plus.double() - minus.double()) / 2 * dy).sum()
    slope = (x.grad.double() * direction).sum()
    magnitude = ((plus.double().abs() + minus.double().abs()) * dy.abs()).sum()
    assert (quotient - slope).abs() <= 64 * 2.0**-24 * magnitude


@pytest.mark.parametrize("needs_grad", [False, True])
def test_autocast(needs_grad):
    x = X.clone().requires_grad_(needs_grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, OFFSETS, Q)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, grouped_linear(X.bfloat16(), OFFSETS, Q))
    if needs_grad:
        y.sum().backward()
        assert x.grad.dtype == torch.float32


def test_only_the_weight_is_saved_for_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_linear(X.clone().requires_grad_(), OFFSETS, Q)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (OFFSETS, *Q.op_args()[:6])}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_for_any_rows(fresh_dynamo, backend, dtype):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x, o: grouped_linear(x, o, Q), fullgraph=True, backend=counter)
    for T in (5, 9, 33):
        leaves = [cases.activations(T, 64, dtype).requires_grad_() for _ in range(2)]
        offsets = torch.tensor([2, T - 3, T - 1], dtype=torch.int32)
        torch._dynamo.mark_dynamic(leaves[1], 0)
        eager, traced = grouped_linear(leaves[0], offsets, Q), compiled(leaves[1], offsets)
        assert torch.equal(eager, traced)
        eager.square().sum().backward()
        traced.square().sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count == 1
