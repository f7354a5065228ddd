"""QuantExperts in the place of every layout of experts that transformers has, against the class itself with Ŵ."""

import copy
import pickle

import pytest
import torch
from support.expert_layouts import LAYOUTS, E, H, experts_of

import nf4kernels as nf4
from nf4kernels import QuantExperts, quantize_experts
from nf4kernels.nn.experts_layout import as_rows, dense_weights


@pytest.fixture(params=LAYOUTS)
def dense(request):
    return experts_of(request.param)


def routed(tokens=20, k=2):
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(tokens, E, generator=generator).topk(k).indices
    return torch.randn(tokens, H, generator=generator), index, torch.rand(tokens, k, generator=generator)


def step(module):
    """(y, the gradients of the tokens, the routing weights, and every bias and norm)"""
    x, index, weights = routed()
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    others = [p for n, p in module.named_parameters() if n.endswith("bias") or "norm" in n]
    for parameter in others:
        parameter.requires_grad_()
    y = module(x, index, weights)
    return [y, *torch.autograd.grad(y.square().sum(), [*leaves, *others])]


def test_equals_the_dense_experts(isa, dense):
    """Two fp32 results of the same chain, each off by less than 2^-18 of the largest."""
    experts = QuantExperts.from_experts(dense)
    twin = experts.to_experts(torch.float32)
    assert type(twin) is type(dense)
    for name, parameter in dense.named_parameters():
        assert twin.get_parameter(name).shape == parameter.shape
        if name.endswith("bias"):
            assert getattr(experts, name) is parameter
            assert torch.equal(getattr(twin, name), parameter)
    for ours, theirs in zip(step(experts), step(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-18 * theirs.abs().max().item())


def test_weights_are_quantized_as_rows(dense):
    """A transposed weight is quantized along the dimension that the product sums."""
    experts = QuantExperts.from_experts(dense)
    for name, rows in dense_weights(dense).items():
        part, expected = getattr(experts, name), quantize_experts(rows.contiguous())
        assert torch.equal(part.weight, expected.packed)
        assert torch.equal(part.absmax, expected.absmax)
        assert torch.equal(as_rows(dense, getattr(experts.to_experts(), name)), part.dequantize(torch.float32))


def test_bfloat16_within_twice_the_dense_error(dense):
    """Of an fp64 step with the same Ŵ; the dense module in bf16 rounds Ŵ besides."""
    experts = QuantExperts.from_experts(dense.bfloat16())
    exact = experts.to_experts(torch.float32).double()
    x, index, weights = routed(40)
    y = exact(x.double(), index, weights.double())
    x, weights = x.bfloat16(), weights.bfloat16()
    errors = [(m(x, index, weights).double() - y).norm() for m in (experts, experts.to_experts(torch.bfloat16))]
    assert errors[0] <= 2 * errors[1]


def test_life(dense, tmp_path):
    """State, copies, pickles, casts, files, quantize_model and merge_model."""
    model = torch.nn.ModuleDict({"experts": dense})
    twin = copy.deepcopy(model)
    names = {name for name, _ in dense.named_parameters()}
    report = nf4.quantize_model(model, progress=False)
    assert [layer.name for layer in report.layers] == [f"experts.{name}" for name in dense_weights(dense)]
    assert all(layer.rms_error < 0.15 for layer in report.layers)
    experts = model.experts
    x, index, weights = routed()
    y = experts(x, index, weights)
    biases = {name for name in names if name.endswith("bias")}
    assert biases <= experts.state_dict().keys()
    for again in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(again(x, index, weights), y)
    again = QuantExperts.from_experts(experts_of_zeros(dense))
    again.load_state_dict(experts.state_dict())
    assert torch.equal(again(x, index, weights), y)

    nf4.save_checkpoint(model, tmp_path / "model.safetensors")
    nf4.load_checkpoint(twin, tmp_path / "model.safetensors")
    assert torch.equal(twin.experts(x, index, weights), y)
    assert experts.bfloat16()(x.bfloat16(), index, weights).dtype == torch.bfloat16
    assert nf4.merge_model(twin) == ["experts"]
    assert {name: p.shape for name, p in twin.experts.named_parameters()} == {
        name: p.shape for name, p in dense.named_parameters()
    }
    torch.testing.assert_close(twin.experts(x, index, weights), y, rtol=0, atol=2**-18 * y.abs().max().item())


def experts_of_zeros(dense):
    module = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def test_merges_into_the_weights_of_a_base():
    dense = experts_of("gpt_oss")
    model, base = torch.nn.ModuleDict({"experts": dense}), torch.nn.ModuleDict({"experts": copy.deepcopy(dense)})
    nf4.quantize_model(model, progress=False)
    nf4.merge_model(model, base)
    for name, parameter in base.experts.named_parameters():
        assert torch.equal(getattr(model.experts, name), parameter), name


def test_a_norm_is_not_asked_about_the_rows_of_no_expert():
    """A norm with a bias would make something of their zeros."""
    dense = experts_of("muse_spark")
    dense.post_expert_norm = torch.nn.LayerNorm(H)
    torch.nn.init.normal_(dense.post_expert_norm.bias)
    experts = QuantExperts.from_experts(dense)
    x, index, weights = routed()
    index[3], index[5, 0] = E, E
    weights.requires_grad_()
    y = experts(x, index, weights)
    assert (y[3] == 0).all()
    alone = experts(x[5:6], index[5:6, 1:], weights[5:6, 1:])
    torch.testing.assert_close(y[5:6], alone)
    (gradient,) = torch.autograd.grad(y.sum(), weights)
    assert (gradient[3] == 0).all()
    assert gradient[5, 0] == 0
    assert gradient[5, 1] != 0


def test_from_quantized_takes_a_module_on_meta():
    """As an importer has it: rows of gpt-oss's gate and up interleaved, biases beside or later."""
    dense = experts_of("gpt_oss")
    expected = QuantExperts.from_experts(dense)
    gate_up, down = expected.gate_up_proj.qweight, expected.down_proj.qweight
    biases = {name: p.detach().clone() for name, p in dense.named_parameters() if name.endswith("bias")}
    x, index, weights = routed()
    y = expected(x, index, weights)
    empty = copy.deepcopy(dense).to("meta")
    experts = QuantExperts.from_quantized(empty, gate_up, down, biases=biases)
    assert torch.equal(experts(x, index, weights), y)
    later = QuantExperts.from_quantized(empty, gate_up, down)
    assert later.down_proj_bias.is_meta
    assert torch.equal(later.down_proj.weight, down.packed)
    later.load_state_dict(experts.state_dict(), assign=True)
    assert torch.equal(later(x, index, weights), y)
    with pytest.raises(ValueError, match=r"QuantExperts: down_proj_bias must have shape \[5, 128\], got \[5, 64\]"):
        QuantExperts.from_quantized(empty, gate_up, down, biases={"down_proj_bias": torch.zeros(E, 64)})


def test_without_a_gate_or_with_biases_by_hand():
    up, down = quantize_experts(torch.randn(E, 64, H)), quantize_experts(torch.randn(E, H, 64))
    bias = torch.randn(E, H)
    experts = QuantExperts(up, down, torch.relu, has_gate=False, biases={"down_proj_bias": bias})
    x, index, weights = routed(4, 1)
    rows = [nf4.linear(torch.relu(nf4.linear(t, up[e])), down[e]) + bias[e] for t, e in zip(x, index[:, 0].tolist())]
    torch.testing.assert_close(experts(x, index, weights), torch.stack(rows) * weights)
    assert experts.weights == ("up_proj", "down_proj")
