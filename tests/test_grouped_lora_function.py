"""The public grouped_lora_linear, and the bias of grouped_linear: refusals, and the gradients of the dense twin."""

import pytest
import torch
import torch._dynamo.testing
from support import cases
from support.experts import offsets_of, rows_of
from torch.func import grad, jvp, vmap

from nf4kernels import grouped_linear, grouped_lora_linear, lora_linear

E, N, K, R, SCALING = 4, 48, 128, 5, 0.75
COUNTS, T = (3, 0, 9, 1), 15  # two rows are of no expert
Q = cases.quantized_experts(E, N, K)
OFFSETS = offsets_of(COUNTS)
NAMES = ("x", "lora_A", "lora_B", "bias")


def arguments(x_dtype=torch.float32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (T, K), "lora_A": (E, R, K), "lora_B": (E, N, R), "bias": (E, N)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.to(x_dtype if name == "x" else dtype) for name, value in values.items()}


def ours(x, lora_A, lora_B, bias, dropout_p=0.0):
    return grouped_lora_linear(x, OFFSETS, Q, lora_A, lora_B, SCALING, bias, dropout_p)


def twin(x, lora_A, lora_B, bias, mask=None, scale=1.0):
    """The dense product, in the dtype of its arguments."""
    y = x.new_zeros(T, N)
    for e, rows in rows_of(COUNTS):
        w, own = cases.dense(Q[e]).to(x.dtype), x[rows]
        dropped = own if mask is None else own * mask[rows] * scale
        of_expert = own @ w.T + SCALING * dropped @ lora_A[e].T @ lora_B[e].T + bias[e]
        y = torch.cat([y[: rows.start], of_expert, y[rows.stop :]])
    return y


A, B, BIAS = arguments()["lora_A"], arguments()["lora_B"], arguments()["bias"]
X = arguments()["x"]
BAD = {
    "qweights": ((X, OFFSETS, Q[0], A, B, 1.0), TypeError, "qweights must be a QuantizedExperts, got Quantized"),
    "x": ((X[0], OFFSETS, Q, A, B, 1.0), ValueError, r"x must be 2-D \[T, K\]"),
    "offsets": ((X, OFFSETS.long(), Q, A, B, 1.0), TypeError, "expert_offsets must be an int32"),
    "A-2d": ((X, OFFSETS, Q, A[0], B, 1.0), ValueError, r"lora_A must have shape \[4, r, 128\], got \[5, 128\]"),
    "A-experts": ((X, OFFSETS, Q, A[1:], B, 1.0), ValueError, r"lora_A must have shape \[4, r, 128\], got \[3,"),
    "B": ((X, OFFSETS, Q, A, B.mT, 1.0), ValueError, r"lora_B must have shape \[4, 48, 5\], got \[4, 5, 48\]"),
    "B-device": ((X, OFFSETS, Q, A, B.to("meta"), 1.0), ValueError, "must be on cpu as x is, got cpu, meta"),
    "bias": ((X, OFFSETS, Q, A, B, 1.0, BIAS[0]), ValueError, r"bias must have shape \[4, 48\], got \[48\]"),
    "dropout": ((X, OFFSETS, Q, A, B, 1.0, None, 1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize(("given", "error", "message"), BAD.values(), ids=BAD)
def test_refuses(given, error, message):
    with pytest.raises(error, match=f"nf4kernels.grouped_lora_linear: .*{message}"):
        grouped_lora_linear(*given)


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_gradients_are_those_of_the_dense_product(isa, x_dtype, dtype):
    """In fp64 of the values that the product takes; each has its own dtype, an expert without rows has zeros."""
    values = {name: value.requires_grad_() for name, value in arguments(x_dtype, dtype).items()}
    dy = cases.activations(T, N, x_dtype, seed=3)
    y = ours(**values)
    y.backward(dy)
    exact = {name: value.detach().to(x_dtype).double().requires_grad_() for name, value in values.items()}
    expected = twin(**exact)
    expected.backward(dy.double())
    eps = torch.finfo(x_dtype).eps
    assert (y.double() - expected).abs().max() <= 4 * eps * expected.abs().max()
    assert not y[13:].any()
    for name in NAMES:
        actual, right = values[name].grad, exact[name].grad
        assert actual.dtype == values[name].dtype, name
        assert (actual.double() - right).norm() <= 4 * max(eps, torch.finfo(actual.dtype).eps) * right.norm(), name
        assert name == "x" or not actual[1].any(), name
    assert not values["x"].grad[13:].any()


@pytest.mark.parametrize("needed", NAMES)
def test_each_gradient_alone(needed):
    """By the same bits as among the others; nothing else is made."""
    together = {name: value.requires_grad_() for name, value in arguments(torch.bfloat16).items()}
    ours(**together).square().sum().backward()
    values = arguments(torch.bfloat16)
    values[needed].requires_grad_()
    ours(**values).square().sum().backward()
    assert torch.equal(values[needed].grad, together[needed].grad)


def test_dropout_has_one_mask_forward_and_backward():
    values = {name: value.requires_grad_() for name, value in arguments().items()}
    torch.manual_seed(5)
    y = ours(**values, dropout_p=0.4)
    y.square().sum().backward()
    torch.manual_seed(5)
    _, mask = torch.native_dropout(values["x"].detach(), 0.4, True)
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    expected = twin(**exact, mask=mask, scale=1 / 0.6)
    expected.square().sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for name in NAMES:
        right = exact[name].grad
        assert (values[name].grad.double() - right).norm() <= 1e-5 * right.norm(), name


def test_one_expert_is_lora_linear(isa):
    """To the bit where the inner products are; they are in fp32 here of exact numbers."""
    qweights = cases.quantized_experts(1, N, K)
    x, lora_A, lora_B = (torch.randint(-2, 3, size).float() for size in ((7, K), (1, 4, K), (1, N, 4)))
    y = grouped_lora_linear(x, torch.tensor([7], dtype=torch.int32), qweights, lora_A, lora_B, 0.5)
    assert torch.equal(y, lora_linear(x, qweights[0], lora_A[0], lora_B[0], 0.5))


def derivatives(function, transform):
    values = arguments()
    if transform == "jvp":
        tangents = tuple(arguments(seed=1).values())
        return jvp(lambda *v: function(**dict(zip(values, v))), tuple(values.values()), tangents)
    if transform == "grad":
        return grad(lambda v: function(**v).square().sum())(values).values()
    if transform == "vmap":
        stacked = {name: torch.stack([value, 2 * value]) for name, value in values.items()}
        return [vmap(lambda v: function(**v))(stacked)]
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    first = torch.autograd.grad(function(**leaves).square().sum(), leaves.values(), create_graph=True)
    return torch.autograd.grad(sum(each.square().sum() for each in first), leaves.values())


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "twice"])
def test_transforms(transform):
    for got, expected in zip(derivatives(ours, transform), derivatives(twin, transform), strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm(), transform


def test_second_derivatives_see_the_mask_of_forward():
    def twice(function):
        leaves = {name: value.requires_grad_() for name, value in arguments().items()}
        torch.manual_seed(5)
        y = function(**leaves)
        first = torch.autograd.grad(y.square().sum(), leaves.values(), create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), leaves.values())

    torch.manual_seed(5)
    _, mask = torch.native_dropout(X, 0.4, True)
    right = twice(lambda **v: twin(**v, mask=mask, scale=1 / 0.6))
    for got, expected in zip(twice(lambda **v: ours(**v, dropout_p=0.4)), right, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_the_bias_of_grouped_linear():
    x, bias = X.clone().requires_grad_(), BIAS.clone().requires_grad_()
    y = grouped_linear(x, OFFSETS, Q, bias)
    none = torch.zeros(E, 0, K), torch.zeros(E, N, 0)
    torch.testing.assert_close(y, twin(X, *none, BIAS), rtol=1e-5, atol=1e-5)
    (y * y.detach()).sum().backward()
    for e, rows in rows_of(COUNTS):
        torch.testing.assert_close(bias.grad[e], y[rows].detach().sum(0), rtol=1e-5, atol=1e-5)
    twice = torch.autograd.grad(grouped_linear(x, OFFSETS, Q, bias).square().sum(), bias, create_graph=True)[0]
    (second,) = torch.autograd.grad(twice.sum(), bias)
    assert torch.equal(second, 2 * torch.tensor(COUNTS)[:, None].expand(E, N).float())


@pytest.mark.parametrize("needs_grad", [False, True])
def test_autocast(needs_grad):
    values = {name: value.requires_grad_(needs_grad) for name, value in arguments().items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(**values)
        if needs_grad:
            y.sum().backward()
    assert torch.equal(y, ours(**{**values, "x": values["x"].bfloat16()}))
    assert y.dtype == torch.bfloat16
    assert all(value.grad.dtype == torch.float32 for value in values.values() if needs_grad)


def test_what_is_saved_for_backward():
    saved = []
    values = {name: value.requires_grad_() for name, value in arguments().items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(**values)
    known = {t.data_ptr() for t in (OFFSETS, *values.values(), *Q.op_args()[:6])}
    assert [list(t.shape) for t in saved if t.data_ptr() not in known] == [[T, R]]


def test_compiles_as_one_graph_for_any_rows():
    dtype = torch.bfloat16
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, o, a, b, c: grouped_lora_linear(x, o, Q, a, b, SCALING, c), fullgraph=True, backend=counter
    )
    for rows in (5, 9, 33):
        offsets = torch.tensor([2, 2, rows - 3, rows - 1], dtype=torch.int32)
        results = []
        for function in (compiled, lambda x, o, a, b, c: grouped_lora_linear(x, o, Q, a, b, SCALING, c)):
            leaves = [cases.activations(rows, K, dtype), *(v.clone() for v in (A, B, BIAS))]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            torch._dynamo.mark_dynamic(leaves[0], 0)
            y = function(leaves[0], offsets, *leaves[1:])
            y.square().sum().backward()
            results.append([y, *(leaf.grad for leaf in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1
    torch._dynamo.reset()
