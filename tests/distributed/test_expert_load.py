"""ExpertLoad counts the tokens of each expert, in training alone, and says how uneven they are."""

import pytest
import torch
from support import tiny
from support.fused_experts import fused

import nf4kernels as nf4
from nf4kernels.distributed import ExpertLoad


def chosen(*experts: int) -> torch.Tensor:
    return torch.tensor(experts)[:, None]


@pytest.mark.parametrize("is_dense", [False, True], ids=["4 bits", "dense"])
def test_the_busiest_expert_over_the_mean(is_dense):
    dense = fused()
    experts = (dense if is_dense else nf4.QuantExperts.from_experts(dense)).train()
    E, H = experts.num_experts, experts.hidden_dim
    load = ExpertLoad(experts)

    def run(index, **kwargs):
        weights = torch.ones(index.shape)
        x = torch.randn(len(index), H)
        return experts(x, index, weights) if not kwargs else experts(x, top_k_index=index, top_k_weights=weights)

    run(chosen(0, 0, 0, 1))
    run(chosen(0, 2), by_name=True)
    experts.eval()
    run(chosen(*[E - 1] * 50))
    expected = {"expert_load_max": 4 * E / 6, "experts_idle": (E - 3) / E}
    assert load.take() == pytest.approx(expected)
    assert load.take() == {}, "it counts anew"
    experts.train()
    run(torch.arange(E)[:, None])
    assert load.take() == {"expert_load_max": 1.0, "experts_idle": 0.0}
    load.remove()
    run(chosen(0))
    assert load.take() == {}


def test_no_expert_is_none_and_the_worst_layer_counts():
    layers = torch.nn.ModuleList([nf4.QuantExperts.from_experts(fused()) for _ in range(2)]).train()
    E, H = layers[0].num_experts, layers[0].hidden_dim
    load = ExpertLoad(layers)
    for layer, index in zip(layers, (chosen(*range(E), E, E, E), chosen(*[1] * (E + 3)))):
        layer(torch.randn(E + 3, H), index, torch.ones(E + 3, 1))
    assert load.take() == {"expert_load_max": float(E), "experts_idle": (E - 1) / (2 * E)}


def test_a_model_without_experts():
    assert ExpertLoad(tiny.Net()).take() == {}


def test_counts_of_a_model_that_was_made_on_meta():
    with torch.device("meta"):
        dense = fused()
    load = ExpertLoad(dense)
    experts = dense.to_empty(device="cpu").train()
    for parameter in experts.parameters():
        parameter.data.normal_()
    experts(torch.randn(2, experts.hidden_dim), chosen(0, 0), torch.ones(2, 1))
    assert load.take()["expert_load_max"] == experts.num_experts
