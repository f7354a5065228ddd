"""Pruning in steps, and training that keeps zeros: what is trained is what is merged."""

import pytest
import torch
from support.byte_lm import ByteLM
from support.unchanged import assert_unchanged, snapshot
from torch import nn
from torch.nn.functional import cross_entropy

import nf4kernels as nf4
from nf4kernels.recover import (
    MaskedLora,
    held,
    merge_pruned,
    prune_in_steps,
    prune_model,
    pruning_schedule,
    share_of_zeros,
)


def text(rows=4, length=20, seed=0):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, ids):
    logits = model(ids)["logits"][:, :-1]
    loss = cross_entropy(logits.reshape(-1, 64), ids[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_the_cubic_schedule():
    assert pruning_schedule(0.5, 4) == pytest.approx([0.5 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)])
    assert pruning_schedule(0.5, 2, start=0.2, kind="linear") == pytest.approx([0.35, 0.5])
    assert pruning_schedule(0.9, 1) == [0.9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 2), "start and final"),
        ((0.2, 2, 0.3), "start and final"),
        ((0.5, 0), "steps"),
        ((0.5, 1, 0.0, "x"), "kind"),
    ],
)  # fmt: skip
def test_schedules_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=f"nf4kernels.recover.pruning_schedule: {message}"):
        pruning_schedule(*arguments)


def test_in_steps_with_training_that_keeps_the_zeros():
    model, seen = ByteLM(), []

    def retrain(model, index, masks):
        before = share_of_zeros(model, masks)
        trained = [model.get_submodule(name).weight for name in masks]
        optimizer = torch.optim.AdamW(trained, 1e-2)
        with held(model, masks, optimizer):
            losses = [step(model, optimizer, text()) for _ in range(3)]
        assert losses[-1] < losses[0]
        assert share_of_zeros(model, masks) == before
        seen.append((index, before))

    results = prune_in_steps(model, lambda m, share: prune_model(m, share, progress=False), 0.5, 3, retrain)
    assert [index for index, _ in seen] == [0, 1, 2]
    assert [share for _, share in seen] == pytest.approx(pruning_schedule(0.5, 3), abs=1e-3)
    earlier = [~results[0][name] & results[2][name] for name in results[0]]
    assert not any(each.any() for each in earlier), "what is pruned stays pruned"


def test_an_optimizer_that_is_not_held_brings_weights_back():
    model = ByteLM()
    masks = prune_model(model, 0.5, progress=False)
    step(model, torch.optim.AdamW(model.parameters(), 1e-2), text())
    assert share_of_zeros(model, masks) < 0.1


def test_a_masked_adapter_is_merged_as_it_was_trained():
    model = ByteLM().bfloat16()
    masks = prune_model(model, pattern="2:4", progress=False)
    dense, before = {name: model.get_submodule(name).weight.clone() for name in masks}, model(text())["logits"]
    adapters = MaskedLora(model, masks, nf4.LoraConfig(r=4))
    assert torch.equal(model(text())["logits"], before), "an adapter starts at zero"
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-2)
    losses = [step(model, optimizer, text()) for _ in range(8)]
    assert losses[-1] < losses[0]
    trained = model(text())["logits"]
    adapters.merge()
    assert torch.equal(model(text())["logits"], trained)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in masks)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any()
        assert not torch.equal(weight, dense[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_masked_adapter_can_be_taken_off():
    model = ByteLM()
    before = snapshot(model)
    adapters = MaskedLora(model, {"layers.0.q_proj": None}, nf4.LoraConfig(r=4))
    step(model, torch.optim.AdamW(adapters.parameters(), 1e-2), text())
    adapters.remove()
    assert_unchanged(model, before)


def test_masked_adapters_that_are_refused():
    model = ByteLM()
    nf4.quantize_model(model, skip=["layers.0"], progress=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"must be a plain nn\.Linear, got QuantLinear"):
        MaskedLora(model, {"layers.0.q_proj": None, "layers.1.q_proj": None}, nf4.LoraConfig(r=4))
    bad = {"x": (None, "must name layers"), "layers.0.k_proj": (torch.ones(1), "must be bool")}
    for name, (mask, message) in bad.items():
        with pytest.raises(ValueError, match=f"nf4kernels.recover.MaskedLora: .*{message}"):
            MaskedLora(model, {"layers.0.q_proj": None, name: mask}, nf4.LoraConfig(r=4))
    with pytest.raises(ValueError, match="must have no dropout"):
        MaskedLora(model, {"layers.0.q_proj": None}, nf4.LoraConfig(r=4, dropout=0.1))
    assert_unchanged(model, before)


def test_a_merge_loses_zeros_and_a_masked_one_does_not():
    model = ByteLM()
    masks = prune_model(model, 0.5, progress=False)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), progress=False)
    assert share_of_zeros(model, masks) == 0.5, "of a uniform weight's halves the kept one rounds to no zero"
    trained = [parameter for name, parameter in model.named_parameters() if "lora" in name]
    step(model, torch.optim.AdamW(trained, 1e-1), text())
    plain = ByteLM()
    nf4.quantize_model(plain, lora=nf4.LoraConfig(r=4), progress=False)
    plain.load_state_dict(model.state_dict())
    nf4.merge_model(plain)
    assert share_of_zeros(plain, masks) < 0.01
    assert set(merge_pruned(model, masks)) == set(masks)
    assert share_of_zeros(model, masks) >= 0.5 - 1e-9
    name = "layers.1.down_proj"
    kept = masks[name]
    assert torch.equal(model.get_submodule(name).weight[kept], plain.get_submodule(name).weight[kept])


def test_what_trains_under_autocast_is_what_is_merged():
    layer = nn.Linear(64, 32)
    model = nn.Sequential(layer)
    adapters = MaskedLora(model, {"0": None}, nf4.LoraConfig(r=4))
    for factor in adapters.parameters():
        factor.data.uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        trained = layer.weight.detach().clone()
    adapters.merge()
    assert torch.equal(layer.weight, trained)
