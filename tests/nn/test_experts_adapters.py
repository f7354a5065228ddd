"""Adapters that QuantExperts hold: their products, their life beside others, what a state keeps of them."""

import copy
import pickle
import re

import pytest
import torch
from support import cases
from torch import nn

import nf4kernels as nf4
from nf4kernels.nn.grouped_quant_linear import ExpertsFactor

E, INTERMEDIATE, HIDDEN, TOKENS, TOP_K = 5, 64, 128, 7, 2
SMALL, LARGE = nf4.LoraConfig(r=2, alpha=4), nf4.LoraConfig(r=4, alpha=4, use_rslora=True)


def fresh(lora=None, dtype=torch.float32):
    gate_up = cases.quantized_experts(E, 2 * INTERMEDIATE, HIDDEN, dtype=dtype)
    experts = nf4.QuantExperts(gate_up, cases.quantized_experts(E, HIDDEN, INTERMEDIATE, dtype=dtype), nn.SiLU())
    if lora is not None:
        experts.add_lora(lora)
    return experts


def fill(experts, std=0.1):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std, generator=generator)
    return experts


def inputs(dtype=torch.float32):
    """The fourth expert has no token, and some have several."""
    generator = torch.Generator().manual_seed(7)
    chosen = [torch.tensor([0, 1, 2, 4])[torch.randperm(4, generator=generator)[:TOP_K]] for _ in range(TOKENS)]
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    return x, torch.stack(chosen), torch.rand(TOKENS, TOP_K, generator=generator).to(dtype)


def dense_twin(experts, x, chosen, weights):
    """By one dense product for each token and expert, in x's dtype, of the values that the adapters have."""
    merged = []
    for part in (experts.gate_up_proj, experts.down_proj):
        w = part.dequantize(torch.float32).to(x.dtype)
        if part.lora is not None:
            A, B = part.lora_A.weight.to(x.dtype), part.lora_B.weight.to(x.dtype)
            w = w + part.lora.scaling * B @ A
        merged.append(w)
    rows = []
    for token in range(x.shape[0]):
        row = 0
        for e, weight in zip(chosen[token].tolist(), weights[token]):
            gate, up = (merged[0][e] @ x[token]).chunk(2)
            row = row + weight * (merged[1][e] @ (nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["plain", "rslora"])
def test_forward_and_gradients_are_those_of_the_dense_twin(config):
    """In fp64, for both factors of both weights, x and the routing weights; an expert without tokens has zeros."""
    experts = fill(fresh(config))
    twin = copy.deepcopy(experts)
    factors = {name: p for name, p in experts.named_parameters() if p.requires_grad}
    assert len(factors) == 4
    for part in (twin.gate_up_proj, twin.down_proj):
        for factor in (part.lora_A, part.lora_B):
            factor.weight = nn.Parameter(factor.weight.detach().double())
    x, chosen, weights = inputs()
    leaves, exact = [t.requires_grad_() for t in (x, weights)], [t.detach().double() for t in (x, weights)]
    exact = [t.requires_grad_() for t in exact]
    y, right = experts(x, chosen, weights), dense_twin(twin, exact[0], chosen, exact[1])
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5 * right.abs().max().item())
    dy = torch.randn(TOKENS, HIDDEN)
    y.backward(dy)
    right.backward(dy.double())
    doubles = dict(twin.named_parameters())
    for name, factor in factors.items():
        error = (factor.grad.double() - doubles[name].grad).norm()
        assert error <= 1e-5 * doubles[name].grad.norm(), name
        assert not factor.grad[3].any(), name
    for leaf, double in zip(leaves, exact):
        assert (leaf.grad.double() - double.grad).norm() <= 1e-5 * double.grad.norm()


def test_a_fresh_adapter_starts_as_each_expert_s_own_would():
    """Its product is zero, and the bits are those without; A as PEFT draws it, by the fan-in of one expert."""
    bare, experts = fresh(), fresh(nf4.LoraConfig(r=64))
    assert torch.equal(experts(*inputs()), bare(*inputs()))
    part = experts.gate_up_proj
    assert part.lora_A.weight.shape == (E, 64, HIDDEN)
    assert part.lora_B.weight.shape == (E, 2 * INTERMEDIATE, 64)
    bound = HIDDEN**-0.5
    assert part.lora_A.weight.abs().max() <= bound
    assert part.lora_A.weight.abs().max() >= 0.99 * bound
    gaussian = fresh(nf4.LoraConfig(r=64, init="gaussian")).gate_up_proj.lora_A.weight
    assert gaussian.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_bf16_computes_with_fp32_adapters_and_casts_leave_the_weights_alone():
    experts = fill(fresh(SMALL))
    experts.gate_up_proj.lora_A.weight.data.mul_(3)
    x, chosen, weights = inputs(torch.bfloat16)
    y = experts(x, chosen, weights)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert experts.down_proj.lora_B.weight.grad.dtype == torch.float32
    right = dense_twin(experts, x.float(), chosen, weights.float())
    assert (y.float() - right).norm() <= 2**-6 * right.norm()
    experts.to(torch.bfloat16)
    assert experts.down_proj.lora_A.weight.dtype == torch.bfloat16
    assert experts.down_proj.weight.dtype == torch.uint8


def test_dropout_is_on_in_training_alone():
    experts = fill(fresh(nf4.LoraConfig(r=4, dropout=0.5)))
    evaluated = experts.eval()(*inputs())
    right = dense_twin(experts, *inputs())
    assert (evaluated - right).norm() <= 1e-5 * right.norm()
    assert not torch.equal(experts.train()(*inputs()), evaluated)


def test_adapters_are_switched_chosen_and_removed_through_the_model():
    model = nn.ModuleDict({"experts": fill(fresh(SMALL))})
    experts = model["experts"]
    with_first, bare = experts(*inputs()), fresh()(*inputs())
    with nf4.disable_adapters(model):
        assert torch.equal(experts(*inputs()), bare)
    assert torch.equal(experts(*inputs()), with_first)
    experts.add_lora(LARGE, name="second")
    assert experts.down_proj.adapter_names == ["default", "second"]
    assert torch.equal(experts(*inputs()), with_first)
    nf4.set_adapter(model, "second")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"experts.{part}.lora_{f}.weight" for part in ("gate_up_proj", "down_proj") for f in "AB"}
    assert torch.equal(experts(*inputs()), bare)
    nf4.remove_adapter(model, "second")
    assert torch.equal(experts(*inputs()), bare)
    nf4.set_adapter(model, "default")
    assert torch.equal(experts(*inputs()), with_first)
    with pytest.raises(ValueError, match="name must be one of the model's adapters"):
        nf4.set_adapter(model, "third")


def test_what_cannot_be_added():
    experts = fresh(SMALL)
    for config, name, message in (
        (SMALL, "default", "must have no adapter 'default' yet"),
        (SMALL, "a.b", "must be a word"),
        (nf4.LoraConfig(init="pissa"), "other", "whose dense weight is gone"),
    ):
        with pytest.raises(ValueError, match=f"nf4kernels.QuantExperts.add_lora: .*{re.escape(message)}"):
            experts.add_lora(config, name=name)
    assert experts.gate_up_proj.adapter_names == experts.down_proj.adapter_names == ["default"]


def test_copies_pickles_and_states_have_the_adapters():
    experts = fill(fresh(SMALL))
    experts.add_lora(LARGE, name="second")
    right = experts(*inputs())
    for copied in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(copied(*inputs()), right)
        assert copied.down_proj.adapter_names == ["default", "second"]
    other = fresh(SMALL)
    other.add_lora(LARGE, name="second")
    other.set_adapter("second")
    other.load_state_dict(experts.state_dict())
    assert other.down_proj.adapter_name == "default"
    assert torch.equal(other(*inputs()), right)


def test_hooks_of_a_factor_bring_its_weight():
    """As accelerate's do for what it has offloaded."""
    experts = fill(fresh(SMALL))
    right, factor = experts(*inputs()), experts.down_proj.lora_B
    assert type(factor) is ExpertsFactor
    kept, calls = factor.weight.data, []
    factor.weight.data = torch.zeros_like(kept)

    def bring(module, _):
        calls.append(module)
        module.weight.data = kept

    factor.register_forward_pre_hook(bring)
    assert torch.equal(experts(*inputs()), right)
    assert calls == [factor]


def test_on_meta_nothing_is_drawn():
    experts = fresh(SMALL).to("meta")
    assert experts.gate_up_proj.lora_A.weight.is_meta
    experts.add_lora(LARGE, dtype=torch.bfloat16, name="second")
    assert experts.down_proj.get_adapter("second")[2].weight.dtype == torch.bfloat16


def test_terms_that_a_caller_brings_take_the_place_of_the_own():
    """Two of them are one product of their ranks' sum."""
    experts, other = fill(fresh(SMALL)), fill(fresh(LARGE), std=0.2)
    terms = {name: getattr(other, name).active_term() for name in other.weights}
    assert torch.equal(experts(*inputs(), terms=terms), other(*inputs()))
    both = {name: [*getattr(experts, name).active_term(), *terms[name]] for name in terms}
    joined = fresh(nf4.LoraConfig(r=6, alpha=6))
    with torch.no_grad():
        for name, each in both.items():
            part = getattr(joined, name)
            part.lora_A.weight.copy_(torch.cat([A for A, _, _ in each], 1))
            part.lora_B.weight.copy_(torch.cat([scaling * B for _, B, scaling in each], 2))
    torch.testing.assert_close(fresh()(*inputs(), terms=both), joined(*inputs()))


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    experts = fill(fresh(SMALL))
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x, chosen, weights = inputs()
    gradients = []
    for function in (experts, compiled):
        experts.zero_grad()
        y = function(x, chosen, weights)
        y.square().sum().backward()
        gradients.append([y, *(p.grad for p in experts.parameters() if p.requires_grad)])
    assert len(gradients[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    torch._dynamo.reset()
