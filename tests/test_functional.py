"""linear and lora_linear under autograd: gradients against the dense product in fp64, and what is saved."""

import itertools
import math

import pytest
import torch
from support import cases
from support.cases import DTYPES, Layout, dtype_id
from torch.utils.checkpoint import checkpoint

from nf4kernels import linear, lora_linear

SCALING = 1.75
NAMES = ("x", "lora_A", "lora_B", "bias")


def inputs(M, N, K, r, dtype, factor_dtype=None, requires=NAMES):
    """x, lora_A, lora_B, bias as leaves; those named in `requires` need a gradient."""
    generator = torch.Generator().manual_seed(N * K + M)
    made = {
        "x": torch.randn(M, K, generator=generator).to(dtype),
        "lora_A": torch.randn(r, K, generator=generator).to(factor_dtype or dtype),
        "lora_B": torch.randn(N, r, generator=generator).to(factor_dtype or dtype),
        "bias": torch.randn(N, generator=generator).to(factor_dtype or dtype),
    }
    return [made[name].requires_grad_(name in requires) for name in NAMES]


def exact_lora(x, A, B, bias, w, dy, mask=None):
    """(y, dx, dA, dB, dbias) of the dense product in fp64; mask is dropout's, already divided by 1 - p."""
    leaves = [t.detach().double().requires_grad_() for t in (x, A, B, bias)]
    x64, A64, B64, bias64 = leaves
    dropped = x64 if mask is None else x64 * mask.double()
    y = x64 @ w.double().T + SCALING * dropped @ A64.T @ B64.T + bias64
    return y.detach(), *torch.autograd.grad(y, leaves, dy.double())


def assert_relative(actual, exact, magnitude, dtype, steps, what):
    """Norm-wise: `steps` roundings to dtype, each of at most half an eps of the terms' magnitude."""
    allowed = steps * torch.finfo(dtype).eps / 2 * magnitude
    error = (actual.double() - exact).norm()
    assert error <= allowed, f"{what}: error {error:.4g}, allowed {allowed:.4g}"


def magnitudes(x, A, B, bias, w, dy):
    """The same five results with every term taken by absolute value: what a rounding error scales with."""
    absolute = [t.detach().double().abs() for t in (x, A, B, bias, w, dy)]
    return [t.norm() for t in exact_lora(*absolute[:4], absolute[4], absolute[5])]


# Roundings to the dtype on the way to each result: of Ŵ or a factor, of the small product, of a partial result, of the
# result, of the scaling. None has more than eight, and fp32 sums of 128 terms stay below one bf16 rounding; in fp32
# itself a sum of n terms adds up to n roundings, which are random: 4 * sqrt(n) covers them.
def steps_of(dtype):
    return 8 if dtype != torch.float32 else 8 + 4 * math.sqrt(128)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(5, 37, 100), (17, 64, 128), (1, 96, 64), (3, 33, 65)], ids=cases.shape_id)
def test_lora_gradients_equal_the_dense_product(isa, shape, dtype):
    M, N, K = shape
    qweight = cases.quantized(N, K)
    w = cases.dense(qweight)
    for requires in itertools.chain.from_iterable(itertools.combinations(NAMES, n) for n in range(5)):
        leaves = inputs(M, N, K, 4, dtype, requires=requires)
        y = lora_linear(leaves[0], qweight, leaves[1], leaves[2], SCALING, leaves[3])
        dy = cases.activations(M, N, dtype, seed=5)
        exact = exact_lora(*leaves, w, dy)
        sizes = magnitudes(*leaves, w, dy)
        assert y.requires_grad == bool(requires)
        assert_relative(y.detach(), exact[0], sizes[0], dtype, steps_of(dtype), f"y {isa}")
        if requires:
            y.backward(dy)
        for name, leaf, expected, size in zip(NAMES, leaves, exact[1:], sizes[1:]):
            if name in requires:
                assert leaf.grad.dtype == leaf.dtype
                assert leaf.grad.shape == leaf.shape
                assert_relative(leaf.grad, expected, size, dtype, steps_of(dtype), f"d{name} {isa} of {requires}")
            else:
                assert leaf.grad is None, f"{name} of {requires}"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(2, 3, 100), (100,), (0, 100), (2, 1, 3, 100), (3, 0, 100)], ids=cases.shape_id)
def test_linear_gradients_equal_the_dense_product(isa, shape, dtype):
    N, K = 37, 100
    qweight = cases.quantized(N, K)
    w = cases.dense(qweight).double()
    for need_x, need_bias in itertools.product((False, True), repeat=2):
        x = torch.randn(shape).to(dtype).requires_grad_(need_x)
        bias = torch.randn(N).to(dtype).requires_grad_(need_bias)
        y = linear(x, qweight, bias)
        assert y.requires_grad == (need_x or need_bias)
        assert y.shape == (*shape[:-1], N)
        dy = torch.randn(y.shape).to(dtype)
        if y.requires_grad:
            y.backward(dy)
        if need_x:
            size = (dy.double().abs() @ w.abs()).norm()
            assert x.grad.shape == x.shape
            assert_relative(x.grad, dy.double() @ w, size, dtype, steps_of(dtype), f"dx {isa}")
        else:
            assert x.grad is None
        if need_bias:
            flat = dy.double().view(-1, N)
            assert_relative(bias.grad, flat.sum(0), flat.abs().sum(0).norm(), dtype, steps_of(dtype), f"dbias {isa}")
        else:
            assert bias.grad is None


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_factors_of_another_dtype(dtype, factor_dtype):
    """bf16 x with fp32 adapters is QLoRA's normal case: each gradient in its own dtype."""
    qweight = cases.quantized(37, 100)
    leaves = inputs(6, 37, 100, 4, dtype, factor_dtype)
    y = lora_linear(leaves[0], qweight, leaves[1], leaves[2], SCALING, leaves[3])
    dy = cases.activations(6, 37, dtype, seed=5)
    y.backward(dy)
    assert y.dtype == dtype
    coarse = max(dtype, factor_dtype, key=lambda d: torch.finfo(d).eps)
    exact, sizes = exact_lora(*leaves, cases.dense(qweight), dy), magnitudes(*leaves, cases.dense(qweight), dy)
    for name, leaf, expected, size in zip(NAMES, leaves, exact[1:], sizes[1:]):
        assert leaf.grad.dtype == leaf.dtype, name
        assert_relative(leaf.grad, expected, size, coarse, steps_of(coarse), f"d{name}")


def test_gradients_of_fp32_factors_are_not_rounded_to_bf16():
    qweight = cases.quantized(37, 100)
    x, A, B, bias = inputs(6, 37, 100, 4, torch.bfloat16, torch.float32)
    lora_linear(x, qweight, A, B, SCALING, bias).square().sum().backward()
    for factor in (A, B):
        assert not torch.equal(factor.grad.bfloat16().float(), factor.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_uses_one_mask(dtype, dropout_p):
    """The mask is read off the output where Ŵ is zero and A, B are identities; every gradient agrees with it."""
    K = 128
    zero = cases.from_parts(
        torch.full((K, K // 2), 0x77, dtype=torch.uint8), torch.zeros(K, K // 64), (K, K), Layout(scale_codebook=None)
    )
    x = (torch.rand(64, K) + 0.5).to(dtype).requires_grad_()
    eye = torch.eye(K, dtype=dtype)
    A, B = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    y = lora_linear(x, zero, A, B, 1.0, None, dropout_p)
    kept = y.detach() != 0
    share = kept.double().mean().item()
    assert abs(share - (1 - dropout_p)) < 5 * math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())  # five deviations
    mask = kept / (1 - dropout_p)
    dropped = x.detach().double() * mask
    eps = torch.finfo(dtype).eps
    assert ((y.detach().double() - dropped).abs() <= 2 * eps * dropped.abs()).all()
    dy = torch.randn(64, K).to(dtype)
    y.backward(dy)
    assert_relative(x.grad, dy.double() * mask, (dy.double() * mask).norm(), dtype, 6, "dx")
    size = (dy.double().abs().T @ dropped.abs()).norm()
    assert_relative(A.grad, dy.double().T @ dropped, size, dtype, steps_of(dtype), "dA")
    assert_relative(B.grad, dy.double().T @ dropped, size, dtype, steps_of(dtype), "dB")


def test_dropout_leaves_the_frozen_path_alone():
    qweight = cases.quantized(37, 100)
    x, A, B, bias = inputs(6, 37, 100, 4, torch.float32)
    plain = linear(x, qweight, bias)
    assert torch.equal(lora_linear(x, qweight, A, torch.zeros_like(B), SCALING, bias, 0.5), plain)


def test_dropout_follows_the_seed():
    qweight = cases.quantized(37, 100)
    x, A, B, bias = inputs(6, 37, 100, 4, torch.bfloat16)
    torch.manual_seed(1)
    first = lora_linear(x, qweight, A, B, SCALING, bias, 0.5)
    torch.manual_seed(1)
    assert torch.equal(lora_linear(x, qweight, A, B, SCALING, bias, 0.5), first)
    assert not torch.equal(lora_linear(x, qweight, A, B, SCALING, bias, 0.5), first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(dropout_p, reentrant):
    """The same bits as without it: the recomputed forward draws the same mask."""
    qweight = cases.quantized(48, 128)
    gradients = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)):
        leaves = inputs(6, 48, 128, 4, torch.bfloat16)
        torch.manual_seed(3)
        y = wrap(lambda x, A, B, b: lora_linear(x, qweight, A, B, SCALING, b, dropout_p).relu(), *leaves)
        y.sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for plain, checkpointed in zip(*gradients):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_autocast_is_what_nn_linear_gives(x_dtype, autocast_dtype):
    qweight = cases.quantized(37, 100)
    dense = torch.nn.Linear(100, 37)
    leaves = inputs(6, 37, 100, 4, x_dtype, torch.float32)
    with torch.autocast("cpu", autocast_dtype):
        expected_dtype = dense(leaves[0]).dtype
        plain = linear(leaves[0], qweight, leaves[3])
        y = lora_linear(leaves[0], qweight, leaves[1], leaves[2], SCALING, leaves[3])
    assert plain.dtype == expected_dtype == autocast_dtype
    assert torch.equal(plain, linear(leaves[0].to(autocast_dtype), qweight, leaves[3]))
    assert y.dtype == autocast_dtype
    y.sum().backward()
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype
    with torch.autocast("cpu", enabled=False):
        assert linear(leaves[0], qweight).dtype == x_dtype


def test_autocast_refuses_what_it_cannot_cast():
    qweight = cases.quantized(37, 100)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"linear: x must be .* got torch.int64"):
        linear(torch.ones(2, 100, dtype=torch.int64), qweight)


def test_double_use_in_one_graph():
    """One weight and one set of factors used twice, and the first result an input of the second."""
    qweight = cases.quantized(64, 64)
    w = cases.dense(qweight).double()
    x, A, B, bias = inputs(6, 64, 64, 4, torch.float32)
    h = lora_linear(x, qweight, A, B, 0.1, bias)
    y = lora_linear(h, qweight, A, B, 0.1, bias) + h
    y.sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, A, B, bias)]

    def dense(v):
        return v @ (w + 0.1 * leaves[2] @ leaves[1]).T + leaves[3]

    h64 = dense(leaves[0])
    (dense(h64) + h64).sum().backward()
    for leaf, exact in zip((x, A, B, bias), leaves):
        # Not cancelling here: fp32 sums of at most 64 terms twice over, 2^-24 each, with room for their growth.
        assert (leaf.grad.double() - exact.grad).norm() <= 2.0**-18 * exact.grad.norm()


def test_gradients_accumulate():
    qweight = cases.quantized(64, 64)
    leaves = inputs(6, 64, 64, 4, torch.float32)
    for _ in range(2):
        lora_linear(leaves[0], qweight, leaves[1], leaves[2], SCALING, leaves[3]).sum().backward()
    once = inputs(6, 64, 64, 4, torch.float32)
    lora_linear(once[0], qweight, once[1], once[2], SCALING, once[3]).sum().backward()
    for twice, single in zip(leaves, once):
        assert torch.equal(twice.grad, 2 * single.grad)


def test_second_backward_needs_retain_graph():
    qweight = cases.quantized(64, 64)
    for function in (
        lambda x, A, B, b: linear(x, qweight, b),
        lambda x, A, B, b: lora_linear(x, qweight, A, B, SCALING, b),
    ):
        leaves = inputs(6, 64, 64, 4, torch.float32)
        y = function(*leaves).sum()
        y.backward(retain_graph=True)
        first = leaves[0].grad.clone()
        y.backward()
        assert torch.equal(leaves[0].grad, 2 * first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function()
    return y, saved


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_no_dense_weight_is_saved(dtype):
    """N * K elements of floating point are saved nowhere: x, the factors, P and the mask are all there is."""
    M, N, K, r = 6, 256, 320, 4
    qweight = cases.quantized(N, K)
    x, A, B, bias = inputs(M, N, K, r, dtype)
    frozen = {t.data_ptr() for t in qweight.op_args()[:6]}

    _, saved = saved_by(lambda: linear(x, qweight, bias))
    assert {t.data_ptr() for t in saved} == frozen, "linear needs the frozen weight alone"

    for dropout_p, expected in ((0.0, [x, A, B]), (0.5, [x, A, B])):
        _, saved = saved_by(lambda p=dropout_p: lora_linear(x, qweight, A, B, SCALING, bias, p))
        rest = [t for t in saved if t.data_ptr() not in frozen]
        sizes = sorted(t.nbytes for t in rest)
        element = torch.finfo(dtype).bits // 8
        mask = [M * K] if dropout_p else []
        assert sizes == sorted([t.nbytes for t in expected] + [M * r * element] + mask)


def test_no_grad_saves_nothing():
    qweight = cases.quantized(64, 64)
    x, A, B, bias = inputs(6, 64, 64, 4, torch.float32)
    with torch.no_grad():
        y, saved = saved_by(lambda: lora_linear(x, qweight, A, B, SCALING, bias) + linear(x, qweight, bias))
    assert saved == []
    assert not y.requires_grad


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_grad_mode_does_not_change_bits(isa, dropout_p):
    qweight = cases.quantized(48, 320)
    for dtype in DTYPES:
        x, A, B, bias = inputs(6, 48, 320, 4, dtype)
        torch.manual_seed(5)
        y = lora_linear(x, qweight, A, B, SCALING, bias, dropout_p)
        torch.manual_seed(5)
        with torch.no_grad():
            assert torch.equal(lora_linear(x, qweight, A, B, SCALING, bias, dropout_p), y)


def test_expanded_gradient():
    """sum() sends an expanded dy of stride 0."""
    qweight = cases.quantized(37, 100)
    results = []
    for dy in (torch.ones(()).expand(6, 37), torch.ones(6, 37), torch.ones(37, 6).T):
        leaves = inputs(6, 37, 100, 4, torch.float32)
        lora_linear(leaves[0], qweight, leaves[1], leaves[2], SCALING, leaves[3]).backward(dy)
        results.append([leaf.grad for leaf in leaves])
    for same in zip(*results):
        for gradient in same[1:]:
            torch.testing.assert_close(gradient, same[0], rtol=2**-20, atol=2**-18)  # BLAS may order sums by stride


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_factors_of_any_strides(isa, dtype):
    """Tied or sliced factors are not contiguous; the values are what counts."""
    qweight = cases.quantized(37, 100)
    x, A, B, bias = inputs(6, 37, 100, 4, dtype, requires=())
    leaves = [x, A.T.contiguous().T, torch.cat([B, B], 1)[:, :4], bias]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert not leaves[1].is_contiguous()
    assert not leaves[2].is_contiguous()
    y = lora_linear(leaves[0], qweight, leaves[1], leaves[2], SCALING, leaves[3])
    dy = cases.activations(6, 37, dtype, seed=5)
    y.backward(dy)
    w = cases.dense(qweight)
    exact, sizes = exact_lora(*leaves, w, dy), magnitudes(*leaves, w, dy)
    for name, actual, expected, size in zip(("y", *NAMES), (y, *(t.grad for t in leaves)), exact, sizes):
        assert_relative(actual.detach(), expected, size, dtype, steps_of(dtype), f"{name} {isa}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_transposed_x_and_gradient(isa, dtype):
    """[batch, sequence] swapped, as attention leaves both: P and Q must suit the op, whatever strides they came of."""
    qweight = cases.quantized(37, 100)
    w = cases.dense(qweight)
    _, A, B, bias = inputs(6, 37, 100, 4, dtype)
    x, dy = torch.randn(6, 5, 100).to(dtype).transpose(0, 1), torch.randn(6, 5, 37).to(dtype).transpose(0, 1)
    leaves = [x.requires_grad_(), A, B, bias]
    y = lora_linear(x, qweight, A, B, SCALING, bias)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert not x.is_contiguous()
    flat = x.detach().reshape(30, 100), A, B, bias, w, dy.reshape(30, 37)
    for name, actual, expected, size in zip(("y", *NAMES), (y, *gradients), exact_lora(*flat), magnitudes(*flat)):
        actual = actual.detach().reshape(expected.shape)
        assert_relative(actual, expected, size, dtype, steps_of(dtype), f"{name} {isa}")


def test_view_of_x_keeps_its_graph():
    qweight = cases.quantized(37, 100)
    base = torch.randn(4, 6, 200, requires_grad=True)
    linear(base.transpose(0, 1)[:, :, 50:150], qweight).sum().backward()
    row = cases.dense(qweight).double().sum(0)
    expected = torch.zeros(4, 6, 200, dtype=torch.float64)
    expected[:, :, 50:150] = row
    torch.testing.assert_close(base.grad.double(), expected, rtol=2**-20, atol=2**-18)
