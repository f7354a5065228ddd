"""sensitivity: KL of one changed layer against agreement, Fisher's information against its closed form, resuming."""

import json
import math
import sys
from collections import UserDict
from unittest.mock import patch

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn

from nf4kernels import LoraConfig, quantize_model
from nf4kernels.recover import Candidate, Sensitivities, agreement, sensitivity
from nf4kernels.recover.candidates import blocks_of, default_candidates, layers_of_one_input
from nf4kernels.recover.sensitivity import fisher_diagonal

NF4, WIDE = Candidate({"codebook": "nf4"}), Candidate({"codebook": "nf4", "block_size": 512})
DENSE = Candidate()
QKV = tuple(f"layers.0.{name}_proj" for name in "qkv")
ATTENTION = (*QKV, "layers.0.o_proj")
MLP = tuple(f"layers.1.{name}_proj" for name in ("gate", "up", "down"))


def text(rows: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def found_by(model, batches, **options):
    return sensitivity(model, batches, progress=False, **options)


def test_each_is_the_agreement_of_a_model_with_that_layer_alone_rounded():
    model, batches = ByteLM(), [text(), text(1, 7, seed=1)]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = found_by(model, batches, candidates=[NF4, DENSE], groups=[QKV], drops=[MLP])
    assert found.rows == 4 * 23 + 6
    assert found.weights == 2 * (4 * 64 * 64 + 3 * 64 * 128)
    kl = {(option.layers, option.candidate.name): option.kl for option in found.options}
    assert len(kl) == 2 * (14 - 2) + 1
    for layers in (QKV, ("layers.1.down_proj",)):
        alone = ByteLM()
        plan = {name: None for names, _ in kl for name in names if name not in layers}
        quantize_model(alone, plan=plan, progress=False)
        assert kl[layers, "nf4"] == pytest.approx(agreement(alone, model, batches).kl, rel=1e-4)
        assert kl[layers, "nf4"] > 0
        assert kl[layers, "dense"] == 0
    without = ByteLM()
    for name in MLP:
        nn.init.zeros_(without.get_submodule(name).weight)
    assert kl[MLP, "dropped"] == pytest.approx(agreement(without, model, batches).kl, rel=1e-4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert type(model.layers[0].q_proj) is nn.Linear


def test_fisher_has_the_closed_form_of_a_linear_classifier():
    """Of softmax(W x): the sum over rows of p_c (1 - p_c) x_k²."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5, bias=False)), torch.randn(3, 6)
    p = model(x).softmax(-1).detach()
    expected = (p * (1 - p)).T @ x.square()
    repeats = 1500
    made = fisher_diagonal(model, [x] * repeats, {"0": model[0]})["0"] / repeats
    # the square of a sum of three scores has at most a standard deviation of a few times its mean
    assert (made / expected - 1).abs().max() < 5 * 3 / math.sqrt(repeats)
    assert model[0].weight.grad is None


def test_fisher_tells_the_kl_of_small_independent_errors():
    """Half the weighted squared error is the KL to second order, within what the sampling of labels leaves."""
    model, batches = ByteLM(width=64), [text(4, 32, seed=seed) for seed in range(6)]
    measured = found_by(model, batches, candidates=[NF4, WIDE])
    told = found_by(model, batches, candidates=[NF4, WIDE], method="fisher")
    scaled = found_by(model, batches, candidates=[NF4, WIDE], method="scaled")
    ratios = torch.tensor([a.kl / b.kl for a, b in zip(told.options, measured.options)])
    assert 0.7 < ratios.log().mean().exp() < 1.4
    assert (ratios.log().abs() < math.log(2)).all()
    closer = torch.tensor([a.kl / b.kl for a, b in zip(scaled.options, measured.options)])[1::2]
    assert [a.kl for a in scaled.options[::2]] == [b.kl for b in measured.options[::2]]
    assert closer.log().abs().mean() < 0.15


def test_a_loftq_adapter_lowers_the_kl():
    adapted = Candidate({"codebook": "nf4", "lora": LoraConfig(r=16, init="loftq")})
    for method in ("measured", "fisher"):
        found = found_by(ByteLM(), [text()], candidates=[NF4, adapted], method=method)
        for plain, better in zip(found.options[::2], found.options[1::2]):
            assert better.kl < plain.kl
            assert better.nbytes > plain.nbytes


def test_flags_gradients_and_modes_come_back():
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 8))
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones(8, 32)
    found_by(model, [torch.randn(5, 32)], candidates=[NF4], method="fisher")
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert torch.equal(model[2].weight.grad, torch.ones(8, 32))
    assert model.training


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    path, options = tmp_path / "found.json", {"candidates": [NF4, WIDE, DENSE]}
    whole = found_by(ByteLM(), [text()], **options)
    module = sys.modules["nf4kernels.recover.sensitivity"]  # by whose name the package has the function
    real, calls = module.divergence, []

    def stopped(*args):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "INTERVAL", 0.0)
    with patch.object(module, "divergence", stopped), pytest.raises(KeyboardInterrupt):
        found_by(ByteLM(), [text()], path=path, **options)
    assert len(calls) == 6
    with pytest.raises(ValueError, match="must be finished"):
        Sensitivities.load(path)
    scaled = ByteLM()
    with torch.no_grad():
        scaled.norm.weight *= 2  # no layer that is rounded
    encoded = [UserDict(input_ids=text(seed=1))]  # a mapping that is no dict, as a tokenizer gives
    for other in (ByteLM(seed=1), scaled, [text(seed=1)], encoded, {"candidates": [NF4]}):
        model, batches = (other if isinstance(other, ByteLM) else ByteLM()), [text()]
        batches = other if isinstance(other, list) else batches
        with pytest.raises(ValueError, match="must hold measurements of the same model, text and arguments"):
            found_by(model, batches, path=path, **(options | (other if isinstance(other, dict) else {})))
    calls.clear()
    with patch.object(module, "divergence", lambda *args: calls.append(1) or real(*args)):
        resumed = found_by(ByteLM(), [text()], path=path, **options)
    assert len(calls) == 2 * 14 - 5
    assert resumed == whole == Sensitivities.load(path)


def test_a_file_of_another_kind(tmp_path):
    for content in ("{}", "[1]", json.dumps({"version": 9})):
        (tmp_path / "found.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="must hold sensitivities, version 1"):
            Sensitivities.load(tmp_path / "found.json")


def test_layers_that_read_one_tensor_are_found_and_blocks():
    model = ByteLM()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
    groups = layers_of_one_input(model, text(), [*names, "lm_head"])
    assert groups == [
        tuple(f"layers.{i}.{name}_proj" for name in each)
        for i in (0, 1) for each in ("qkv", "o", ("gate", "up"), ("down",))
    ] + [("lm_head",)]  # fmt: skip
    blocks = blocks_of(model, names)
    assert [len(block) for block in blocks] == [7, 7]
    assert not model.layers[0].q_proj._forward_pre_hooks


def test_wrong_arguments():
    model = ByteLM()
    for options, message in (
        ({"method": "guess"}, "method must be one of measured, fisher, scaled, got 'guess'"),
        ({"groups": [("layers.9.q_proj",)]}, "groups must name layers that can be quantized, got 'layers.9.q_proj'"),
        ({"drops": [("lm_head",)]}, "drops must name layers that can be quantized, got 'lm_head'"),
        ({"groups": [QKV, QKV[:1]]}, "groups must have each layer once, got 'layers.0.q_proj' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            found_by(model, [text()], **options)
    with pytest.raises(ValueError, match="batches must have rows that count"):
        found_by(model, [])
    with pytest.raises(ValueError, match="must have a layer to quantize"):
        found_by(nn.Sequential(nn.ReLU()), [torch.ones(2, 2)])


def test_the_defaults_are_such_as_quantize_takes():
    names = [candidate.name for candidate in default_candidates()]
    assert names[:2] == ["nf4 64", "nf4 4096"]
    assert len(set(names)) == len(names)
    assert names[-1] == "dense"
