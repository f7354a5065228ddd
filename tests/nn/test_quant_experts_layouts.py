"""Which modules QuantExperts can stand for, and why not for the others."""

import re

import pytest
import torch
import torch._dynamo.testing
from support.fused_experts import PARTS, E, H, I, fused, without_attribute
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import nf4kernels as nf4
from nf4kernels import QuantExperts


def with_attribute(name, value):
    module = fused()
    setattr(module, name, value)
    return module


class OtherForward(MixtralExperts):
    def forward(self, hidden_states, router_logits):
        return hidden_states


def biases_of_another_shape():
    module = with_attribute("has_bias", True)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        setattr(module, name, nn.Parameter(torch.zeros(E, H)))
    return module


def other_forward():
    module = fused()
    module.__class__ = OtherForward
    return module


# A module that QuantExperts cannot stand for, and the reason given.
OTHER_LAYOUTS = {
    "transposed": (lambda: with_attribute("is_transposed", True), "MixtralExperts, whose down_proj .* does not fit"),
    "biases": (lambda: with_attribute("has_bias", True), "MixtralExperts, which has no down_proj_bias, gate_up_proj_b"),
    "bias-shape": (biases_of_another_shape, r"whose gate_up_proj_bias \[5, 128\] does not fit its gate_up_proj"),
    "no-gate": (lambda: with_attribute("has_gate", False), "MixtralExperts, experts without a gate and a gate_up_pr"),
    "interleaved": (lambda: with_attribute("is_concatenated", False), "gate and up interleaved, and no gate function"),
    "norm": (lambda: with_attribute("has_post_expert_norm", True), "MixtralExperts, which has no post_expert_norm"),
    "parallel": (lambda: with_attribute("_is_expert_parallel", True), "experts with a share on each process"),
    "silent": (lambda: without_attribute("is_transposed"), "which does not say how its experts are laid out"),
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
        ValueError, match=rf"from_experts: module must have a layout of transformers' fused experts, got .*{reason}"
    ):
        QuantExperts.from_experts(module)
    model = nn.ModuleDict({"experts": module})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = nf4.quantize_model(model, progress=False)
    assert model.experts is module
    left = {entry.name: entry.reason for entry in report.skipped}
    assert all(re.search(reason, left[f"experts.{part}"]) for part in PARTS)
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
