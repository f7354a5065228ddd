"""Adapters switched off and on, removed, replaced, and several on a layer by name."""

import copy
import pickle

import pytest
import torch
from support import tiny
from torch import nn

import nf4kernels as nf4

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
SMALL, LARGE = nf4.LoraConfig(r=2, alpha=4), nf4.LoraConfig(r=8, alpha=4)


@pytest.fixture
def layer():
    return nf4.QuantLinear(64, 64, dtype=torch.float32)


@pytest.fixture
def model():
    return tiny.fill_adapters(tiny.quantized_llama(lora=SMALL))


def logits(model):
    with torch.no_grad():
        return model(tiny.IDS).logits


def base_logits():
    return logits(tiny.quantized_llama())


def several(layer, **configs):
    """`layer` with these adapters, none of them zero; and name -> a layer with that one alone."""
    base = copy.deepcopy(layer)
    alone = {}
    for name, config in configs.items():
        layer.add_lora(config, name=name)
        nf4.set_adapter(layer, name)
        nn.init.normal_(layer.lora_B.weight)
        alone[name] = copy.deepcopy(base)
        alone[name].add_lora(config)
        alone[name].lora_A.load_state_dict(layer.lora_A.state_dict())
        alone[name].lora_B.load_state_dict(layer.lora_B.state_dict())
    return layer, alone


# Off


def test_disabled_adapters_leave_the_base(model):
    """DPO needs the reference model's log-probabilities from the same weights, without a copy: to the bit."""
    with_adapter = logits(model)
    with nf4.disable_adapters(model):
        assert torch.equal(logits(model), base_logits())
    assert torch.equal(logits(model), with_adapter)
    assert not torch.equal(with_adapter, base_logits())


def test_disabled_adapters_come_back_after_an_error_and_when_nested(model):
    before = logits(model)
    with pytest.raises(ZeroDivisionError), nf4.disable_adapters(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    with nf4.disable_adapters(model):
        with nf4.disable_adapters(model):
            pass
        assert torch.equal(logits(model), base_logits())
    assert torch.equal(logits(model), before)


def test_disabling_does_not_touch_state_or_gradients(model, tmp_path):
    names = list(model.state_dict())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with nf4.disable_adapters(model):
        assert list(model.state_dict()) == names
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
        nf4.save_adapters(model, tmp_path)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_made_while_disabled_is_not_disabled(layer, duplicate):
    layer, _ = several(layer, a=LARGE)
    expected = layer(X)
    with nf4.disable_adapters(layer):
        twin = duplicate(layer)
    assert torch.equal(twin(X), expected)


def test_disabling_works_through_checkpointing(model):
    """A checkpoint computes its part again in backward: inside the block that is the base, too."""
    nf4.prepare_for_training(model)
    model.train()
    with nf4.disable_adapters(model):
        model(tiny.IDS, labels=tiny.IDS).loss.backward()
    assert all(p.grad is None or not p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_a_compiled_layer_sees_the_switch(layer):
    """torch.compile guards on it: no stale graph after it."""
    layer, alone = several(layer, a=SMALL, b=LARGE)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), alone["b"](X))
    with nf4.disable_adapters(compiled):
        assert torch.equal(compiled(X), nf4.linear(X, layer.qweight, layer.bias))
    nf4.set_adapter(compiled, "a")
    assert torch.equal(compiled(X), alone["a"](X))


def test_training_goes_on_after_the_block(model):
    """A step of DPO: the reference without gradients, then the policy with them."""
    with torch.no_grad(), nf4.disable_adapters(model):
        reference = model(tiny.IDS).logits
    (model(tiny.IDS).logits - reference).square().mean().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


# Removed and replaced


def test_an_adapter_is_removed(model):
    nf4.remove_adapter(model)
    assert not any("lora_" in name for name in model.state_dict())
    assert torch.equal(logits(model), base_logits())
    for layer in tiny.layers(model).values():
        layer.add_lora(LARGE)
    assert torch.equal(logits(model), base_logits())


def test_an_adapter_of_another_rank_takes_its_place(model, tmp_path):
    other = tiny.fill_adapters(tiny.quantized_llama(lora=LARGE))
    nf4.save_adapters(other, tmp_path)
    nf4.load_adapters(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_an_adapter_of_the_same_rank_keeps_the_parameters(model, tmp_path):
    """So that an optimizer which has them goes on."""
    other = tiny.fill_adapters(tiny.quantized_llama(lora=SMALL))
    nf4.save_adapters(other, tmp_path)
    before = [id(p) for p in model.parameters()]
    nf4.load_adapters(model, tmp_path)
    assert [id(p) for p in model.parameters()] == before
    assert torch.equal(logits(model), logits(other))


def test_an_adapter_of_fewer_layers_takes_its_place(model, tmp_path):
    other = tiny.quantized_llama()
    for name, layer in tiny.layers(other).items():
        if name.endswith("q_proj"):
            layer.add_lora(SMALL)
    tiny.fill_adapters(other)
    nf4.save_adapters(other, tmp_path)
    nf4.load_adapters(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


# Several


def test_several_adapters_by_name(layer):
    layer, alone = several(layer, small=SMALL, large=LARGE)
    for name in ("small", "large", "small"):
        nf4.set_adapter(layer, name)
        assert torch.equal(layer(X), alone[name](X))
        assert layer.lora == alone[name].lora
        assert layer.adapter_names[0] == layer.adapter_name == name
    nf4.remove_adapter(layer, "large")
    assert torch.equal(layer(X), alone["small"](X))
    nf4.remove_adapter(layer, "small")
    assert torch.equal(layer(X), nf4.linear(X, layer.qweight, layer.bias))


def test_a_further_adapter_waits(layer):
    layer, alone = several(layer, a=SMALL)
    layer.add_lora(nf4.LoraConfig(r=3, init="gaussian"), name="b")
    assert torch.equal(layer(X), alone["a"](X))
    assert layer.adapter_names == ["a", "b"]


def test_one_adapter_has_the_names_of_before(layer):
    layer.add_lora(SMALL)
    keys = set(layer.state_dict())
    assert {"lora_A.weight", "lora_B.weight"} < keys
    assert [name for name, _ in layer.named_children()] == ["lora_A", "lora_B"]
    layer.add_lora(LARGE, name="other")
    assert set(layer.state_dict()) - keys == {f"adapters.other.lora_{factor}.weight" for factor in "AB"}
    nf4.remove_adapter(layer, "other")
    assert [name for name, _ in layer.named_children()] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_several_adapters_survive_a_copy(layer, duplicate):
    layer, alone = several(layer, a=SMALL, b=LARGE)
    twin = duplicate(layer)
    for name in ("a", "b"):
        nf4.set_adapter(twin, name)
        assert torch.equal(twin(X), alone[name](X))


@pytest.mark.parametrize("active", ["a", "b"])
def test_several_adapters_survive_a_state_dict(layer, active):
    """Also where another one is active than when it was taken: the two states are told apart by their names."""
    layer, alone = several(layer, a=SMALL, b=nf4.LoraConfig(r=2, alpha=1))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other, _ = several(nf4.QuantLinear(64, 64, dtype=torch.float32), a=SMALL, b=nf4.LoraConfig(r=2, alpha=1))
    nf4.set_adapter(other, active)
    other.load_state_dict(state, strict=True)
    assert other.adapter_name == "b"
    for name in ("a", "b"):
        nf4.set_adapter(other, name)
        assert torch.equal(other(X), alone[name](X))


def test_several_adapters_are_cast_and_moved(layer):
    layer, _ = several(layer, a=SMALL, b=LARGE)
    layer.to(torch.bfloat16)
    assert {p.dtype for name, p in layer.named_parameters() if "lora" in name} == {torch.bfloat16}


def test_only_the_active_adapter_trains(layer):
    """Others with gradients would be an error in DDP, and weights that decay unseen in an optimizer."""
    layer, _ = several(layer, a=SMALL, b=LARGE)
    layer(X).sum().backward()
    trained = {"bias", "lora_A.weight", "lora_B.weight"}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == trained
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == trained
    nf4.set_adapter(layer, "a")
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == trained
    assert layer.lora.r == SMALL.r


def test_an_adapter_of_some_layers_leaves_the_others_without(model):
    first = next(iter(tiny.layers(model).values()))
    before = logits(model)
    first.add_lora(LARGE, name="other")
    nf4.set_adapter(model, "other")
    assert [layer.lora for layer in tiny.layers(model).values() if layer is not first] == [None] * 13
    assert torch.equal(logits(model), base_logits())  # a fresh adapter is zero
    nf4.set_adapter(model, "default")
    assert torch.equal(logits(model), before)


def test_several_adapters_on_disk(model, tmp_path):
    """One directory an adapter, each loaded beside the others and active at once."""
    other = tiny.fill_adapters(tiny.quantized_llama(lora=LARGE))
    nf4.save_adapters(model, tmp_path / "a")
    nf4.save_adapters(other, tmp_path / "b")
    both = tiny.quantized_llama()
    nf4.load_adapters(both, tmp_path / "a", name="a")
    nf4.load_adapters(both, tmp_path / "b", name="b")
    assert torch.equal(logits(both), logits(other))
    nf4.save_adapters(both, tmp_path / "again", name="a")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    nf4.set_adapter(both, "a")
    assert torch.equal(logits(both), logits(model))


@pytest.mark.parametrize("active", ["a", "b", None])
def test_several_adapters_in_a_checkpoint(layer, tmp_path, active):
    layer, alone = several(layer, a=SMALL, b=LARGE)
    layer.set_adapter(active)
    net = nn.ModuleDict({"fc": layer})
    nf4.save_checkpoint(net, tmp_path / "a.safetensors")
    for fresh in (nn.ModuleDict({"fc": nn.Linear(64, 64)}), copy.deepcopy(net)):
        nf4.load_checkpoint(fresh, tmp_path / "a.safetensors")
        assert sorted(fresh["fc"].adapter_names) == ["a", "b"]
        assert fresh["fc"].lora == layer.lora
        assert torch.equal(fresh["fc"](X), layer(X))
        for name in ("a", "b"):
            nf4.set_adapter(fresh, name)
            assert torch.equal(fresh["fc"](X), alone[name](X))
    if active is not None:
        twin = copy.deepcopy(net)
        nf4.set_adapter(twin, {"a": "b", "b": "a"}[active])
        with pytest.raises(ValueError, match=rf"fc must have the active adapter '{active}' that the file has"):
            nf4.load_checkpoint(twin, tmp_path / "a.safetensors")


# Refused


def test_an_unknown_name_is_an_error(model):
    """The message lists the names there are, and nothing is switched."""
    for layer in tiny.layers(model).values():
        layer.add_lora(LARGE, name="other")
    for function in (nf4.set_adapter, nf4.remove_adapter):
        with pytest.raises(ValueError, match=r"name must be one of the model's adapters \['default', 'other'\]"):
            function(model, "ohter")
    assert {layer.adapter_name for layer in tiny.layers(model).values()} == {"default"}
    with pytest.raises(ValueError, match="model must have a layer in 4 bits with an adapter, got none called 'ohter'"):
        nf4.save_adapters(model, "nowhere", name="ohter")
    not_a_module = pytest.raises(TypeError, match=r"disable_adapters: model must be an nn\.Module, got dict")
    with not_a_module, nf4.disable_adapters({}):
        pass


def test_a_second_adapter_of_a_name_is_an_error(layer):
    """add_lora does not throw a trained adapter away."""
    layer.add_lora(SMALL)
    with pytest.raises(ValueError, match="already"):
        layer.add_lora(LARGE)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", 3])
def test_a_name_that_no_module_can_have_is_an_error(layer, name):
    with pytest.raises(ValueError, match="add_lora: name must be a word that can be a module's name"):
        layer.add_lora(SMALL, name=name)


def test_a_refused_state_leaves_the_active_adapter():
    layer = nf4.QuantLinear(64, 32, lora=nf4.LoraConfig(r=2))
    layer.add_lora(nf4.LoraConfig(r=2), name="other")
    other = copy.deepcopy(layer)
    other.set_adapter("other")
    state = other.state_dict()
    state["absmax"] = state["absmax"].float()
    with pytest.raises(RuntimeError, match="absmax must be"):
        layer.load_state_dict(state)
    assert layer.adapter_name == "default"
