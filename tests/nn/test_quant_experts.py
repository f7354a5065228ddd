"""QuantExperts: what transformers' fused experts compute, from 4 bits, and its gradients."""

import pytest
import torch
import torch._dynamo.testing
from support.cases import DTYPES, Layout, dtype_id
from support.fused_experts import INDEX, WEIGHTS, E, H, X, assert_close, exact, fused, routed, without_attribute
from torch import nn
from torch.nn.functional import silu
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from nf4kernels import QuantExperts, linear, quantize_experts


def by_linear(experts, x, index, weights, dtype=None):
    """The same sum, each expert's rows by nf4kernels.linear, rows of an expert in the order of the tokens."""
    tokens, k = index.shape
    y = torch.zeros(tokens, k, H, dtype=x.dtype)
    gate_up, down = experts.gate_up_proj.qweight, experts.down_proj.qweight
    for e in range(experts.num_experts):
        token, slot = (index == e).nonzero(as_tuple=True)
        if len(token):
            gate, up = linear(x[token], gate_up[e]).chunk(2, -1)
            y = y.index_put((token, slot), linear(silu(gate) * up, down[e]))
    total = torch.zeros(tokens, H)
    for slot in range(k):
        total = total + weights[:, slot, None].float() * y[:, slot].float()
    return total.to(dtype or x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("layout", [Layout(), Layout(64, "fp4", None), Layout(32, "custom", "dynamic8")], ids=str)
def test_equals_the_dense_experts(isa, layout, tokens, dtype):
    experts = QuantExperts.from_experts(fused(), **layout.options)
    for k in (1, 2, E):
        x, index, weights = routed(tokens, k, dtype)
        y = experts(x, index, weights)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert torch.equal(y, by_linear(experts, x, index, weights)), f"{isa}: not the bits of linear, expert by expert"
        assert_close(y, *exact(experts, x, index, weights), dtype, f"{isa} k={k}")


@pytest.mark.parametrize("kind", [MixtralExperts, Qwen3MoeExperts, OlmoeExperts, DeepseekV3Experts])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_stands_for_the_modules_of_transformers(kind, implementation):
    """Against the class itself, with Ŵ for its weights, in each of transformers' ways to compute it."""
    experts = QuantExperts.from_experts(fused(kind))
    dense = experts.to_experts(torch.float32)
    dense.config._experts_implementation = implementation
    assert type(dense) is kind
    x, index, weights = routed(40)
    outputs, gradients = [], []
    for module in (experts, dense):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = module(leaves[0], index, leaves[1])
        y.backward(torch.ones_like(y))
        outputs.append(y.detach())
        gradients.append([leaf.grad for leaf in leaves])
    for y in outputs:
        assert_close(y, *exact(experts, x, index, weights), torch.float32, kind.__name__)
    # Two fp32 results of the same chain, each off by less than 2^-18 of the largest.
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-18 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradients_equal_those_of_the_dense_experts(isa, dtype):
    """Norm-wise against fp64: both ways pass two products, whose roundings are random, and silu's derivative."""
    experts = QuantExperts.from_experts(fused())
    x, index, weights = routed(40, 2, dtype)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    dy = torch.randn(40, H).to(dtype)
    experts(x, index, weights).backward(dy)
    x64, weights64 = (leaf.detach().double().requires_grad_() for leaf in (x, weights))
    exact(experts, x64, index, weights64)[0].backward(dy.double())
    for leaf, leaf64 in ((x, x64), (weights, weights64)):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.double() - leaf64.grad).norm() / leaf64.grad.norm()
        assert error <= 4 * torch.finfo(dtype).eps, f"{isa}: relative error {error:.3g}"
    assert all(parameter.grad is None for parameter in experts.parameters())


ROUTES = {
    "all-in-one-expert": torch.full((7, 1), 3),
    "first-and-last-expert-only": torch.tensor([[0, 4], [4, 0], [0, 4]]),
    "the-same-expert-twice": torch.tensor([[2, 2], [1, 2], [2, 2]]),
    "int32": torch.tensor([[1, 0], [0, 2]], dtype=torch.int32),
    "uint8": torch.tensor([[1, 0], [0, 2]], dtype=torch.uint8),
    "no-tokens": torch.empty(0, 2, dtype=torch.int64),
    "no-choices": torch.empty(3, 0, dtype=torch.int64),
}


@pytest.mark.parametrize("index", ROUTES.values(), ids=ROUTES)
def test_routes(isa, index):
    experts = QuantExperts.from_experts(fused())
    x, weights = torch.randn(len(index), H).requires_grad_(), torch.rand(index.shape).requires_grad_()
    y = experts(x, index, weights)
    assert torch.equal(y, by_linear(experts, x, index, weights))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weights.grad.shape == weights.shape
    assert index.numel() == 0 or x.grad.count_nonzero() == x.numel()


def test_the_expert_of_another_process_counts_as_none(isa):
    experts = QuantExperts.from_experts(fused())
    x, index, weights = routed(9)
    away = torch.tensor([[True, False], [False, False], [True, True]]).repeat(3, 1)
    index[away] = E
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    y = experts(x, index, weights)
    assert torch.equal(y, by_linear(experts, x, index, weights))
    y.sum().backward()
    assert (y[2::3] == 0).all()
    assert (leaves[0].grad[2::3] == 0).all()
    assert (leaves[1].grad[away] == 0).all()
    assert (leaves[1].grad[~away] != 0).all()


@pytest.mark.parametrize("bad", [-1, E + 1, 10**6])
def test_an_index_out_of_range_is_an_error(bad):
    experts = QuantExperts.from_experts(fused())
    x, index, weights = routed(9)
    index[4, 1] = bad
    with pytest.raises(RuntimeError, match=rf"nf4kernels.sort_by_expert: top_k_index must be in 0\.\.{E}"):
        experts(x, index, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_token_does_not_see_the_others(isa, dtype):
    experts = QuantExperts.from_experts(fused())
    x, index, weights = routed(20, 2, dtype)
    alone = experts(x, index, weights)
    for value in (torch.nan, torch.inf, 0.0):
        others = torch.full_like(x, value)
        others[7] = x[7]
        assert torch.equal(experts(others, index, weights)[7], alone[7])


def test_threads_and_repetition_do_not_change_bits(native_library):
    experts = QuantExperts.from_experts(fused())
    x, index, weights = routed(300)

    def step():
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = experts(leaves[0], index, leaves[1])
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    torch.set_num_threads(1)
    one = step()
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        y, dx, dweights = step()
        assert torch.equal(y, one[0])
        assert torch.equal(dx, one[1])
        torch.testing.assert_close(dweights, one[2])  # a sum by torch over each row, whose order it chooses


@pytest.mark.parametrize("act_fn", [nn.GELU(), nn.ReLU(), torch.tanh], ids=["gelu", "relu", "function"])
def test_any_elementwise_activation(act_fn):
    module = without_attribute("act_fn")
    module.act_fn = act_fn
    experts = QuantExperts.from_experts(module)
    x, index, weights = routed(20)
    expected = experts.to_experts(torch.float32)(x, index, weights)
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=0, atol=2**-18 * expected.abs().max().item())


@pytest.mark.parametrize("compute_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_compute_dtype(dtype, compute_dtype):
    experts = QuantExperts.from_experts(fused(), compute_dtype)
    x, index, weights = routed(9, 2, dtype)
    y = experts(x, index, weights)
    assert y.dtype == dtype
    assert torch.equal(y, by_linear(experts, x.to(compute_dtype or dtype), index, weights, dtype))


def test_routing_weights_of_a_wider_dtype():
    """fp32 router, bf16 experts: transformers' normal case. The weighted sum is then rounded once."""
    experts = QuantExperts.from_experts(fused())
    x, index, weights = routed(9, 2, torch.bfloat16)
    weights = torch.rand(9, 2).requires_grad_()
    y = experts(x, index, weights)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, by_linear(experts, x, index, weights))
    y.sum().backward()
    assert weights.grad.dtype == torch.float32


def test_autocast_wins_over_compute_dtype():
    experts = QuantExperts.from_experts(fused(), torch.float16)
    x, index, weights = routed(9)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x.requires_grad_(), index, weights)
    assert y.dtype == torch.float32, "as transformers' own: the sum is in the dtype of hidden_states"
    assert torch.equal(y, by_linear(experts, x.bfloat16(), index, weights, torch.float32))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_torch_func_goes_through():
    experts = QuantExperts.from_experts(fused())
    x = X.clone().requires_grad_()
    experts(x, INDEX, WEIGHTS).square().sum().backward()
    by_transform = torch.func.grad(lambda z: experts(z, INDEX, WEIGHTS).square().sum())(X)
    torch.testing.assert_close(by_transform, x.grad, rtol=1e-4, atol=1e-4)


BAD = {
    "double": ((X.double(), INDEX, WEIGHTS), TypeError, r"hidden_states must be float32.* got torch\.float64"),
    "columns": (
        (X[:, 1:], INDEX, WEIGHTS),
        ValueError,
        r"hidden_states must have shape \[tokens, 128\], got \[6, 127\]",
    ),
    "3d": ((X[None], INDEX, WEIGHTS), ValueError, r"hidden_states must have shape .* got \[1, 6, 128\]"),
    "index-rows": ((X, INDEX[1:], WEIGHTS), ValueError, r"top_k_index must have shape \[6, k\].* got \[5, 2\]"),
    "index-1d": ((X, INDEX[:, 0], WEIGHTS), ValueError, r"top_k_index must have shape .* got \[6\]"),
    "index-float": ((X, INDEX.float(), WEIGHTS), TypeError, r"top_k_index must be integers, got torch\.float32"),
    "index-bool": ((X, INDEX.bool(), WEIGHTS), TypeError, r"top_k_index must be integers, got torch\.bool"),
    "weights-k": ((X, INDEX, WEIGHTS[:, 1:]), ValueError, r"top_k_weights must have shape .* got \[6, 1\]"),
    "weights-1d": ((X, INDEX, WEIGHTS[:, 0]), ValueError, r"top_k_weights must have shape .* got \[6\]"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_forward_refuses(arguments, error, message):
    with pytest.raises(error, match=f"^nf4kernels.QuantExperts: {message}"):
        QuantExperts.from_experts(fused())(*arguments)


def test_constructor_refuses():
    gate_up, down = quantize_experts(torch.randn(3, 128, 64)), quantize_experts(torch.randn(3, 64, 64))
    QuantExperts(gate_up, down, silu)
    for arguments, error, message in (
        ((torch.randn(3, 128, 64), down), TypeError, "gate_up must be a QuantizedExperts, got Tensor"),
        ((gate_up, down[0]), TypeError, "down must be a QuantizedExperts, got QuantizedWeight"),
        ((gate_up, quantize_experts(torch.randn(2, 64, 64))), ValueError, r"down must have shape \[3, 64, 64\]"),
        ((gate_up, quantize_experts(torch.randn(3, 64, 128))), ValueError, r"down must have .* got \[3, 64, 128\]"),
    ):
        with pytest.raises(error, match=f"nf4kernels.QuantExperts: {message}"):
            QuantExperts(*arguments, silu)
    with pytest.raises(TypeError, match=r"compute_dtype must be .* got torch\.int8"):
        QuantExperts(gate_up, down, silu, torch.int8)
