"""QuantExperts: what transformers' fused experts compute, from 4 bits; its gradients, its life, and whole models."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from support.cases import DTYPES, Layout, dtype_id
from torch import nn
from torch.nn.functional import silu
from transformers import DeepseekV3Config, MixtralConfig, MixtralForCausalLM, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeForCausalLM

import nf4kernels as nf4
from nf4kernels import QuantExperts, linear, quantize_experts
from nf4kernels.nn.quant_module import BUFFERS

E, H, I = 5, 128, 192  # noqa: E741
PARTS = ("gate_up_proj", "down_proj")


def fused(kind=MixtralExperts, dtype=torch.float32):
    """A module of transformers with fused experts, Gaussian weights."""
    configs = {
        MixtralExperts: MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E),
        Qwen3MoeExperts: Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E),
        OlmoeExperts: OlmoeConfig(hidden_size=H, intermediate_size=I, num_experts=E),
        DeepseekV3Experts: DeepseekV3Config(hidden_size=H, moe_intermediate_size=I, n_routed_experts=E),
    }
    config = configs[kind]
    config._experts_implementation = "eager"
    module = kind(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[2] ** -0.5)
    return module.to(dtype)


def routed(tokens, k=2, dtype=torch.float32, seed=0):
    """(hidden_states, top_k_index, top_k_weights), no expert twice for a token."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, E, generator=generator).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator)
    return torch.randn(tokens, H, generator=generator).to(dtype), index, weights.to(dtype)


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
    return (y * weights[..., None]).sum(1).to(dtype or x.dtype)


def exact(experts, x, index, weights):
    """(y, magnitude): in fp64 from Ŵ, and with every term by absolute value, which a rounding error scales with."""
    gate_up, down = (getattr(experts, name).dequantize(torch.float32).double() for name in PARTS)
    x, weights = x.double(), weights.double()
    y, magnitude = torch.zeros_like(x), torch.zeros_like(x)
    for slot in range(index.shape[1]):
        W, V, w = gate_up[index[:, slot]], down[index[:, slot]], weights[:, slot, None]
        gate, up = torch.einsum("th,tnh->tn", x, W).chunk(2, -1)
        y = y + w * torch.einsum("ti,thi->th", silu(gate) * up, V)
        gate, up = torch.einsum("th,tnh->tn", x.abs(), W.abs()).chunk(2, -1)
        magnitude = magnitude + w.abs() * torch.einsum("ti,thi->th", gate * up, V.abs())
    return y, magnitude


def assert_close(actual, expected, magnitude, dtype, what):
    """At most fourteen roundings to the dtype on the way (of both weights and their scales, gate, up, silu, their
    product, y, its weighting, the result), silu's slope of 1.1 among them; fp32 sums of 128 and 192 terms besides."""
    allowed = (14 * torch.finfo(dtype).eps / 2 * 1.1 + (H + I) * 2.0**-24) * magnitude
    excess = (actual.double() - expected).abs() - allowed
    assert (excess <= 0).all(), f"{what}: off by up to {excess.max():.3g} more than allowed"


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
    with pytest.raises(RuntimeError, match=rf"nf4kernels.QuantExperts: top_k_index must be in 0\.\.{E}"):
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


X, INDEX, WEIGHTS = routed(6)
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


def with_attribute(name, value):
    module = fused()
    setattr(module, name, value)
    return module


def without_attribute(name):
    module = fused()
    delattr(module, name)
    return module


class OtherForward(MixtralExperts):
    def forward(self, hidden_states, router_logits):
        return hidden_states


def minimax():
    module = fused()
    module._apply_gate = None
    module.__class__ = type("OwnGate", (MixtralExperts,), {"_apply_gate": MiniMaxM3VLExperts._apply_gate})
    del module._apply_gate
    return module


def other_forward():
    module = fused()
    module.__class__ = OtherForward
    return module


def gpt_oss():
    module = GptOssExperts(GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


# A module that QuantExperts cannot stand for, and the reason given.
OTHER_LAYOUTS = {
    "gpt-oss": (gpt_oss, "GptOssExperts, experts with transposed weights, biases, gate and up interleaved"),
    "transposed": (lambda: with_attribute("is_transposed", True), "MixtralExperts, experts with transposed weights"),
    "biases": (lambda: with_attribute("has_bias", True), "MixtralExperts, experts with biases"),
    "no-gate": (lambda: with_attribute("has_gate", False), "MixtralExperts, experts with no gate"),
    "interleaved": (lambda: with_attribute("is_concatenated", False), "experts with gate and up interleaved"),
    "norm": (lambda: with_attribute("has_post_expert_norm", True), "experts with a norm of their own"),
    "parallel": (lambda: with_attribute("_is_expert_parallel", True), "experts with a share on each process"),
    "silent": (lambda: without_attribute("is_transposed"), "which does not say how its experts are laid out"),
    "own-gate": (minimax, "OwnGate, experts with a gate of their own"),
    "bias-parameter": (
        lambda: with_attribute("down_proj_bias", nn.Parameter(torch.zeros(E, H))),
        "MixtralExperts, which also holds down_proj_bias",
    ),
    "submodule": (lambda: with_attribute("norm", nn.LayerNorm(H)), "MixtralExperts, which also holds norm"),
    "no-activation": (lambda: without_attribute("act_fn"), "MixtralExperts, which has no act_fn"),
    "other-forward": (other_forward, "OtherForward, whose forward does not take hidden_states, top_k_index, top_k_wei"),
    "down-shape": (
        lambda: with_attribute("down_proj", nn.Parameter(torch.randn(E, H, 64))),
        r"whose down_proj \[5, 128, 64\] does not fit its gate_up_proj \[5, 384, 128\]",
    ),
    "2-D": (lambda: with_attribute("down_proj", nn.Parameter(torch.randn(H, I))), "a 3-D parameter of MixtralExperts"),
}


@pytest.mark.parametrize(("make", "reason"), OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_another_layout_is_refused_and_left_alone(make, reason):
    module = make()
    with pytest.raises(
        ValueError, match=rf"from_experts: module must have the layout of Mixtral's experts, got .*{reason}"
    ):
        QuantExperts.from_experts(module)
    model = nn.ModuleDict({"experts": module})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = nf4.quantize_model(model, progress=False)
    assert model.experts is module
    left = {entry.name: entry.reason for entry in report.skipped}
    assert all(reason.replace("\\", "") in left[f"experts.{part}"] for part in PARTS)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter)


def test_rows_that_are_no_whole_blocks_are_left_alone():
    config = MixtralConfig(hidden_size=96, intermediate_size=I, num_local_experts=E)
    narrow = MixtralExperts(config)
    with pytest.raises(ValueError, match=r"where gate_up_proj have rows that are no multiple of 64"):
        QuantExperts.from_experts(narrow)
    report = nf4.quantize_model(nn.ModuleDict({"a": fused()}), block_size=128, progress=False)
    assert report.layers == []
    assert "down_proj have rows that are no multiple of 128" in report.skipped[0].reason


def test_from_experts_names_a_nan_and_keeps_the_training_mode():
    module = fused().eval()
    assert not QuantExperts.from_experts(module).training
    with torch.no_grad():
        module.down_proj[3, 5, 7] = torch.nan
    with pytest.raises(ValueError, match=r"expert 3: .* got nan at row 5, column 7"):
        QuantExperts.from_experts(module)


def assert_same(a, b):
    for name, tensor in b.state_dict().items():
        now = a.state_dict()[name]
        assert now.dtype == tensor.dtype, name
        assert torch.equal(now, tensor), name


def save_and_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": save_and_load}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_copies_are_separate_and_whole(duplicate):
    experts = QuantExperts.from_experts(fused()).eval()
    copied = duplicate(experts)
    assert_same(copied, experts)
    assert not copied.training
    for a, b in zip((*experts.parameters(), *experts.buffers()), (*copied.parameters(), *copied.buffers())):
        assert a.data_ptr() != b.data_ptr()
    x, index, weights = routed(9)
    assert torch.equal(copied(x, index, weights), experts(x, index, weights))
    dense = copied.to_experts()
    assert type(dense) is MixtralExperts
    assert not list(copied.gate_up_proj.children())
    assert dense.gate_up_proj.dtype == torch.bfloat16


CASTS = {
    "half": lambda m: m.half(),
    "to-dtype": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
    "double-and-back": lambda m: m.double().float(),
    "in-a-model": lambda m: nn.Sequential(m).to("cpu", torch.float16)[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("layout", [Layout(), Layout(scale_codebook=None)], ids=str)
def test_casts_leave_the_weights_alone(cast, layout):
    experts = QuantExperts.from_experts(fused(), **layout.options)
    before = copy.deepcopy(experts)
    experts = cast(experts)
    assert_same(experts, before)
    assert experts.gate_up_proj.qweight.dtype == torch.float32
    x, index, weights = routed(9, 2, torch.bfloat16)
    assert torch.equal(experts(x, index, weights), before(x, index, weights))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
def test_state_dict_round_trip(meta, assign):
    experts = QuantExperts.from_experts(fused())
    with torch.device("meta" if meta else "cpu"):
        other = QuantExperts.from_experts(fused())
    if meta:
        assert all(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
        with pytest.raises(ValueError, match=r"nf4kernels.QuantExperts.qweight: the layer is on the meta device"):
            other.to_experts()
        other = other if assign else other.to_empty(device="cpu")
    state = experts.state_dict()
    assert set(state) == {f"{part}.{name}" for part in PARTS for name in ("weight", *BUFFERS, "source_dtype")}
    result = other.load_state_dict({key: value.clone() for key, value in state.items()}, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(other, experts)
    x, index, weights = routed(9)
    assert torch.equal(other(x, index, weights), experts(x, index, weights))
    assert not any(parameter.requires_grad for parameter in other.parameters())


def changed(key, function):
    return lambda state: state.update({key: function(state[key])})


# A change to the state, or the layout of the module that it is from, and the key that the message names.
REFUSED_STATES = {
    "shape": (changed("down_proj.weight", lambda t: t[:, 1:]), "down_proj.weight must be"),
    "experts": (changed("gate_up_proj.weight", lambda t: t[1:]), "gate_up_proj.weight must be"),
    "dtype": (changed("down_proj.absmax", lambda t: t.float()), "down_proj.absmax must be torch.uint8"),
    "half": (changed("gate_up_proj.scale_absmax", lambda t: t.half()), "gate_up_proj.scale_absmax must be"),
    "offset": (changed("gate_up_proj.scale_offset", lambda t: t[0]), r"gate_up_proj.scale_offset must be .* \[5\]"),
    "missing": (lambda state: state.pop("down_proj.code"), "down_proj.code"),
    "unexpected": (lambda state: state.update(extra=torch.zeros(1)), "extra"),
    "codebook": (Layout(codebook="af4"), "gate_up_proj.code must be the nf4 codebook"),
    "block-size": (Layout(32), "gate_up_proj.absmax must be"),
    "no-double-quant": (Layout(scale_codebook=None), "gate_up_proj.absmax must be torch.uint8"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED_STATES.values(), ids=REFUSED_STATES)
def test_a_state_that_does_not_fit_is_refused(source, message):
    experts = QuantExperts.from_experts(fused())
    if isinstance(source, Layout):
        state = QuantExperts.from_experts(fused(), **source.options).state_dict()
    else:
        state = experts.state_dict()
        source(state)
    with pytest.raises(RuntimeError, match=message):
        experts.load_state_dict(state)


def test_a_scale_cast_behind_its_back_is_an_error():
    for name in ("scale_absmax", "scale_offset", "code", "scale_code"):
        experts = QuantExperts.from_experts(fused())
        setattr(experts.down_proj, name, getattr(experts.down_proj, name).bfloat16())
        with pytest.raises(TypeError, match=f"nf4kernels.QuantExperts: {name} must stay float32, got torch.bfloat16"):
            experts(X, INDEX, WEIGHTS)


def test_meta_forward_gives_shapes():
    experts = QuantExperts.from_experts(fused()).to("meta")
    x = X.to("meta").requires_grad_()
    y = experts(x, INDEX.to("meta"), WEIGHTS.to("meta"))
    assert y.is_meta
    assert y.shape == (6, H)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_to_experts(dtype):
    module = fused()
    experts = QuantExperts.from_experts(module)
    dense = experts.to_experts(dtype)
    for name in PARTS:
        weight = getattr(dense, name)
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        each = [nf4.dequantize(q, dtype) for q in quantize_experts(getattr(module, name))]
        assert torch.equal(weight, torch.stack(each))
        assert getattr(experts, name).dequantize(dtype).data_ptr() != weight.data_ptr()
    assert dense.config is module.config
    assert dense is not module
    assert module.gate_up_proj is not None, "the module it was made from is as it was"
    back = experts.to_experts(torch.float32, [getattr(module, name) for name in PARTS])
    for name in PARTS:
        assert torch.equal(getattr(back, name), getattr(module, name))
        assert getattr(back, name).data_ptr() != getattr(module, name).data_ptr()
    made = QuantExperts(experts.gate_up_proj.qweight, experts.down_proj.qweight, silu)
    assert torch.equal(made(X, INDEX, WEIGHTS), experts(X, INDEX, WEIGHTS))
    with pytest.raises(ValueError, match="to_experts: the module must be from from_experts"):
        made.to_experts()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_for_any_number_of_tokens(fresh_dynamo, backend):
    experts = QuantExperts.from_experts(fused())
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    for tokens in (6, 17, 40):
        x, index, weights = routed(tokens, seed=tokens)
        gradients = []
        for module in (experts, compiled):
            leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
            for tensor in (*leaves, index):
                torch._dynamo.mark_dynamic(tensor, 0)
            y = module(leaves[0], index, leaves[1])
            y.square().sum().backward()
            gradients.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for eager, traced in zip(*gradients):
            torch.testing.assert_close(traced, eager, rtol=0, atol=2**-18 * eager.abs().max().item())
    assert counter.frame_count == 1


def test_prints_what_it_is():
    text = str(QuantExperts.from_experts(fused(), codebook="fp4"))
    for part in ("num_experts=5", "in_features=128", "out_features=384", "codebook=fp4", "down_proj", "act_fn"):
        assert part in text


SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(intermediate_size=64, num_local_experts=8, **SIZES)),
    "qwen3": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            intermediate_size=64, moe_intermediate_size=64, num_experts=8, head_dim=16, norm_topk_prob=True, **SIZES
        ),
    ),
}
EXPERTS = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]


def language_model(name):
    """Random, with experts that matter and a router whose choices are far apart beside fp32's rounding."""
    kind, config = MODELS[name]
    config._experts_implementation = "eager"
    model = kind(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key or "mlp.gate" in key:
                parameter.normal_(std=0.125)
    return model


def test_quantize_model_takes_experts_and_merge_model_gives_them_back():
    model = language_model("mixtral")
    base, ids = copy.deepcopy(model), torch.randint(0, 64, (2, 9))
    report = nf4.quantize_model(model, progress=False, lora=nf4.LoraConfig(r=2))
    names = [f"{experts}.{part}" for experts in EXPERTS for part in PARTS]
    assert [layer.name for layer in report.layers if "experts" in layer.name] == names
    for layer in report.layers:
        if layer.kind not in PARTS:
            continue
        weight = base.get_parameter(layer.name)
        part = model.get_submodule(layer.name)
        assert layer.shape == tuple(weight.shape)
        assert layer.bytes_before == weight.nbytes
        assert layer.bytes_after == sum(tensor.nbytes for tensor in part.state_dict().values())
        error = (part.dequantize(torch.float32).double() - weight.double()).norm() / weight.double().norm()
        assert layer.rms_error == pytest.approx(error.item(), rel=1e-6)
    assert "8 x 128 x 64" in str(report)
    assert report.model_bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    again = nf4.quantize_model(model, progress=False)
    assert again.layers == []
    reasons = {entry.name: (entry.reason, entry.shape) for entry in again.skipped}
    assert reasons[names[0]] == ("already a QuantExperts", (8, 128, 64))

    logits = model(ids).logits
    assert set(EXPERTS) < set(nf4.merge_model(model, dtype=torch.float32))
    assert type(model.get_submodule(EXPERTS[0])) is MixtralExperts
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=2**-18 * logits.abs().max().item())
    assert nf4.merge_model(model) == []


def test_merge_into_the_base_gives_the_base_back():
    model = language_model("mixtral")
    base = copy.deepcopy(model)
    nf4.quantize_model(model, progress=False)
    nf4.merge_model(model, base, torch.float32)
    for (name, tensor), (base_name, expected) in zip(model.state_dict().items(), base.state_dict().items()):
        assert name == base_name
        assert torch.equal(tensor, expected)
    assert (
        model.get_parameter(f"{EXPERTS[0]}.down_proj").data_ptr()
        != base.get_parameter(f"{EXPERTS[0]}.down_proj").data_ptr()
    )


def break_base(base, how):
    experts = base.get_submodule(EXPERTS[1])
    if how == "missing":
        del base.model.layers[1].mlp.experts
    elif how == "shape":
        experts.down_proj = nn.Parameter(torch.randn(8, 64, 128))
    elif how == "quantized":
        nf4.quantize_model(base, progress=False)
    elif how == "meta":
        experts.to("meta")
    return base


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "base must have a layer model.layers.1.mlp.experts, got none"),
        ("shape", r"base must have model.layers.1.mlp.experts.down_proj in shape \[8, 64, 64\], got \[8, 64, 128\]"),
        ("quantized", "base must have .* in floating point as model.layers.0"),
        ("meta", "base must be loaded, got model.layers.1.mlp.experts.gate_up_proj on the meta device"),
    ],
)
def test_merge_with_a_wrong_base_changes_nothing(how, message):
    model = language_model("mixtral")
    base = break_base(copy.deepcopy(model), how)
    nf4.quantize_model(model, progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        nf4.merge_model(model, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_experts_that_were_never_dense_cannot_be_merged():
    experts = QuantExperts.from_experts(fused())
    model = nn.ModuleDict({"a": QuantExperts(experts.gate_up_proj.qweight, experts.down_proj.qweight, silu)})
    with pytest.raises(ValueError, match=r"a must have been made by QuantExperts.from_experts, got one that was not"):
        nf4.merge_model(model)
    assert isinstance(model.a, QuantExperts)


@pytest.mark.parametrize("skip", ["experts", "down_proj", "*.experts.gate_up_proj", "model.layers.1.mlp"])
def test_skip_names_experts_or_one_of_their_weights(skip):
    model = language_model("mixtral")
    report = nf4.quantize_model(model, skip=("lm_head", skip), progress=False)
    left = [entry.name for entry in report.skipped if entry.reason == f"skip={skip!r}"]
    expected = EXPERTS if skip != "model.layers.1.mlp" else EXPERTS[1:]
    assert left == [f"{experts}.{part}" for experts in expected for part in PARTS]
    assert type(model.get_submodule(EXPERTS[1])) is MixtralExperts


def test_experts_tied_to_each_other_stay():
    model = nn.ModuleList([fused(), fused()])
    model[1].down_proj = model[0].down_proj
    report = nf4.quantize_model(model, progress=False)
    assert {entry.reason for entry in report.skipped} == {"tied to 1.down_proj", "tied to 0.down_proj"}


def test_one_module_under_two_names_is_replaced_under_both():
    module = fused()
    model = nn.ModuleDict({"a": module, "b": module})
    assert len(nf4.quantize_model(model, progress=False).layers) == 2
    assert isinstance(model.a, QuantExperts)
    assert model.a is model.b
    assert nf4.merge_model(model) == ["a"]
    assert type(model.a) is MixtralExperts
    assert model.a is model.b


def test_a_nan_is_named_and_nothing_changes():
    model = language_model("mixtral")
    with torch.no_grad():
        model.get_parameter(f"{EXPERTS[1]}.down_proj")[6, 3, 9] = math.inf
    match = "the weight of model.layers.1.mlp.experts.down_proj must be finite, got inf at expert 6, row 3, column 9"
    with pytest.raises(ValueError, match=match):
        nf4.quantize_model(model, progress=False)
    assert not any(isinstance(module, (QuantExperts, nf4.QuantLinear)) for module in model.modules())
    nf4.quantize_model(model.double() and model.float(), progress=False, nonfinite="propagate", double_quant=False)
    assert model.get_submodule(EXPERTS[1]).down_proj.dequantize().isnan().any()


def test_a_model_that_is_experts_itself_is_refused():
    for module in (fused(), QuantExperts.from_experts(fused())):
        for function in (nf4.quantize_model, nf4.merge_model):
            with pytest.raises(ValueError, match=r"model must contain its layers, got a .*Experts itself"):
                function(module)


def test_a_model_on_meta():
    with torch.device("meta"):
        model = language_model("mixtral")
    report = nf4.quantize_model(model, progress=False)
    assert isinstance(model.get_submodule(EXPERTS[0]), QuantExperts)
    assert math.isnan(report.rms_error)
    with pytest.raises(ValueError, match="meta device"):
        nf4.merge_model(model)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_checkpoint(tmp_path, device):
    model, ids = language_model("mixtral"), torch.randint(0, 64, (2, 9))
    nf4.quantize_model(model, progress=False)
    nf4.save_checkpoint(model, tmp_path / "a")
    other = language_model("mixtral")
    nf4.quantize_model(other, progress=False)
    if device == "meta":
        for experts in EXPERTS:
            other.get_submodule(experts).to("meta")
    nf4.load_checkpoint(other, tmp_path / "a")
    assert torch.equal(other(ids).logits, model(ids).logits)
    fp4 = language_model("mixtral")
    nf4.quantize_model(fp4, progress=False, codebook="fp4")
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj\.code must be the fp4 codebook"):
        nf4.load_checkpoint(fp4, tmp_path / "a")
    with pytest.raises(ValueError, match=r"the checkpoint must have the model's names"):
        nf4.load_checkpoint(language_model("mixtral"), tmp_path / "a")


STEPS = 40


def train(model):
    """(losses, the trained parameters): router, norms, embeddings and head learn which token follows which."""
    generator = torch.Generator().manual_seed(1)
    follows = torch.randperm(64, generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(any(part in name for part in ("mlp.gate.", "norm", "embed", "lm_head")))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        sequence = [torch.randint(0, 64, (4, 1), generator=generator)]
        for _ in range(15):
            sequence.append(follows[sequence[-1]])
        ids = torch.cat(sequence, 1)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), trained


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_trains_its_router_as_the_dense_one_does(name):
    """The curve is that of the dense model with Ŵ. How far apart two fp32 models may be is measured: transformers' own
    two ways to multiply by the same Ŵ differ by rounding alone. What other products would do is measured, too: by the
    weights from before quantization, which are 9 % away. (By this seed no router's second and third choice come closer
    than 1e-4, so that rounding changes no choice.)
    """
    model = language_model(name)
    original = copy.deepcopy(model)
    nf4.quantize_model(model, progress=False)
    assert sum(isinstance(module, QuantExperts) for module in model.modules()) == 2
    dense = copy.deepcopy(model)
    nf4.merge_model(dense, dtype=torch.float32)
    batched = copy.deepcopy(dense)
    batched.config._experts_implementation = "batched_mm"
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}

    losses, trained = train(model)
    expected, expected_trained = train(dense)
    assert losses[0] > 4
    assert losses[-5:].max() < 0.05, "the loss did not fall"
    rounding = (train(batched)[0] - expected).abs().max()
    allowed = 8 * (rounding + 2.0**-22)
    apart, other_weights = (losses - expected).abs().max(), (train(original)[0] - expected).abs().max()
    assert apart <= allowed, f"{apart:.3g} apart, {rounding:.3g} by rounding"
    assert other_weights > 1000 * allowed, "the comparison would not have seen other weights"
    routers = [key for key in trained if "mlp.gate." in key]
    assert len(routers) == 2
    for key in routers:
        learned, expected_learned = (p[key].detach() - start[key] for p in (trained, expected_trained))
        assert expected_learned.norm() > 0.1 * start[key].norm(), "the router did not train"
        assert (learned - expected_learned).norm() <= 2.0**-10 * expected_learned.norm()
