"""That PEFT chooses our layers: with and without a configuration, before and after quantizing, in both directions."""

import pytest
import torch
from support import tiny
from support.peft_layers import SEVERAL_ON_PARAMETERS, One, adapted, dense, fill_adapters, peft, quantized
from torch import nn

import nf4kernels as nf4
from nf4kernels.integrations.peft import LoraQuantLinear, QuantExpertsWrapper, dispatch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tiny.IDS).logits


def adapters(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def config(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def test_installing_again_changes_nothing():
    from peft.tuners.lora import model

    chosen = model.dispatch_default, peft.tuners.lora.Linear.__setattr__
    dispatch.install()
    assert chosen == (model.dispatch_default, peft.tuners.lora.Linear.__setattr__)


def test_all_linear_layers_are_ours():
    model = peft.get_peft_model(tiny.quantized_llama(), config())
    found = adapters(model)
    assert len(found) == 2 * len(LINEARS)
    assert {type(layer) for layer in found.values()} == {LoraQuantLinear}


def test_loaded_without_a_configuration(tmp_path):
    model = peft.get_peft_model(tiny.quantized_llama(), config())
    fill_adapters(model)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = peft.PeftModel.from_pretrained(tiny.quantized_llama(), tmp_path, **options)
        assert {type(layer) for layer in adapters(loaded).values()} == {LoraQuantLinear}
        assert torch.equal(logits(loaded), logits(model))
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_quantized_after_peft_wrapped_it(options):
    model = peft.get_peft_model(tiny.llama(), config(**options))
    fill_adapters(model)
    nf4.quantize_model(model, progress=False)
    found = adapters(model)
    assert {type(layer) for layer in found.values()} == {LoraQuantLinear}
    before = logits(model)
    twin = peft.get_peft_model(tiny.quantized_llama(), config(**options))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), before)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_experts_quantized_after_peft_wrapped_them():
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = peft.get_peft_model(
        tiny.make("MixtralForCausalLM", num_local_experts=4), config(target_modules=[], target_parameters=targets)
    )
    fill_adapters(model)
    nf4.quantize_model(model, progress=False)
    before = logits(model)
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert isinstance(experts.get_base_layer(), nf4.QuantExperts)
    assert type(experts) is type(experts.base_layer) is QuantExpertsWrapper
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_parameters_are_counted_as_in_the_dense_model():
    ours = peft.get_peft_model(tiny.quantized_llama(), config())
    theirs = peft.get_peft_model(tiny.llama(), config())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_a_user_s_own_class_comes_first():
    class Own(peft.tuners.lora.Linear):
        pass

    own = peft.LoraConfig(target_modules=["layer"])
    own._register_custom_module({nf4.QuantLinear: Own})
    model = peft.get_peft_model(One(quantized()), own)
    assert type(model.base_model.model.layer) is Own


def test_a_parameter_s_name_means_the_layer():
    model, layer = adapted(quantized(), target_modules=[], target_parameters=["layer.weight"])
    assert isinstance(layer, LoraQuantLinear)
    _, plain = adapted(quantized())
    x = torch.randn(3, 192)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer(x), plain(x))
    if SEVERAL_ON_PARAMETERS:
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=[], target_parameters=["layer.weight"]))
        assert set(layer.lora_A) == {"default", "other"}


def test_modules_to_save_are_dense_and_train(tmp_path):
    """PEFT copies a module that is trained whole; the copy of one in 4 bits is dense, of the same weight."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer, self.head = dense(shape=(64, 64)), nn.Sequential(dense(shape=(32, 64)))

        def forward(self, x):
            return self.head(self.layer(x))

    def make():
        model = Two()
        nf4.quantize_model(model, skip=[], progress=False)
        return model

    x = torch.randn(3, 64)
    base = make()
    expected = base(x)
    assert isinstance(base.head[0], nf4.QuantLinear)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["layer"], modules_to_save=["head"]))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    head = model.base_model.model.head.modules_to_save["default"][0]
    assert type(head) is nn.Linear
    assert head.weight.requires_grad
    model(x).square().sum().backward()
    with torch.no_grad():
        head.weight -= 0.1 * head.weight.grad
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    over_dense = peft.PeftModel.from_pretrained(Two(), tmp_path)
    assert torch.equal(over_dense.base_model.model.head.modules_to_save["default"][0].weight, head.weight)
