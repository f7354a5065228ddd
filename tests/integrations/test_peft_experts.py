"""PEFT's target_parameters on QuantExperts: trained, saved, loaded, merged, and the same file on dense experts."""

import copy

import pytest
import torch
from support import tiny
from support.peft_layers import SEVERAL_ON_PARAMETERS, fill_adapters, peft

import nf4kernels as nf4
from nf4kernels.integrations.peft import QuantExpertsWrapper, merge_into

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral(dtype=torch.float32):
    return tiny.make("MixtralForCausalLM", dtype=dtype, **EXPERTS)


def quantized_mixtral(dtype=torch.float32):
    model = mixtral(dtype)
    nf4.quantize_model(model, progress=False)
    assert isinstance(model.model.layers[0].mlp.experts, nf4.QuantExperts)
    return model


def config(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": [], "target_parameters": TARGETS, **options})


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.IDS).logits


def adapted(**options):
    model = peft.get_peft_model(quantized_mixtral(), config(**options))
    fill_adapters(model)
    return model.eval()


def dequantized():
    """The dense model whose weights are Ŵ."""
    model = quantized_mixtral()
    nf4.merge_model(model)
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_a_file_is_the_same_adapter_on_dense_experts(tmp_path, options):
    model = adapted(**options)
    assert not torch.allclose(logits(model), logits(quantized_mixtral()), atol=1e-3)
    model.save_pretrained(tmp_path)
    for base in (dequantized(), quantized_mixtral()):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(loaded), logits(model))


def test_a_dense_model_s_adapter_loads_over_experts_in_4_bits(tmp_path):
    dense = peft.get_peft_model(dequantized(), config()).eval()
    fill_adapters(dense)
    dense.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized_mixtral(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_on_dense_experts(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    gradients = []
    for base in (quantized_mixtral(), dequantized()):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
        loaded(input_ids=tiny.IDS, labels=tiny.IDS).loss.backward()
        gradients.append({name: p.grad for name, p in loaded.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert set(ours) == set(theirs)
    assert len(ours) == 2 * 2 * 2  # layers, weights, factors
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item(), msg=name)


def test_training_lowers_the_loss():
    model = peft.get_peft_model(quantized_mixtral(), config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tiny.IDS, labels=tiny.IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_merged_and_unmerged():
    model = adapted()
    before = logits(model)
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert type(experts) is type(experts.base_layer) is QuantExpertsWrapper
    packed = experts.get_base_layer()
    bits = packed.down_proj.weight.clone()
    model.merge_adapter()
    assert type(experts.get_base_layer()).__name__ == "MixtralExperts"
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    model.unmerge_adapter()
    assert experts.get_base_layer() is packed
    assert torch.equal(packed.down_proj.weight, bits)
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(quantized_mixtral()), rtol=0, atol=0)


@pytest.mark.parametrize("has_own", [False, True])
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "gate_up", "down"])
def test_merged_and_unloaded(targets, has_own):
    """With an adapter of ours below PEFT's, too."""
    base = quantized_mixtral()
    if has_own:
        for layer in base.model.layers:
            layer.mlp.experts.add_lora(nf4.LoraConfig(r=2))
        fill_adapters(base)
        assert not torch.allclose(logits(base), logits(quantized_mixtral()), atol=1e-3)
    own = logits(base)
    model = peft.get_peft_model(base, config(target_parameters=targets))
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)  # PEFT's begin as zeros
    fill_adapters(model)
    model.eval()
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.model.layers[1].mlp.experts).__name__ == "MixtralExperts"
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_merged_into_the_base_and_into_4_bits():
    model = adapted()
    base = mixtral()
    adapter = model.base_model.model.model.layers[0].mlp.experts  # of down_proj
    delta = adapter.get_delta_weight("default")
    expected_weight = base.model.layers[0].mlp.experts.down_proj + delta
    with merge_into(base):
        merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged.model.layers[0].mlp.experts.down_proj, expected_weight, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="4 bits again"), merge_into("4bit"):
        rounded = model.merge_and_unload()
    experts = rounded.model.layers[0].mlp.experts
    assert isinstance(experts, nf4.QuantExperts)
    dense = dequantized().model.layers[0].mlp.experts.down_proj + delta
    assert (experts.down_proj.dequantize(torch.float32) - dense).norm() < 0.12 * dense.norm()


def test_several_adapters(tmp_path):
    model = adapted()
    first = logits(model)
    if not SEVERAL_ON_PARAMETERS:
        with pytest.raises(ValueError, match="only one LoRA adapter"):
            model.add_adapter("other", config(r=2))
        return
    model.add_adapter("other", config(r=2))
    fill_adapters(model, 0.05)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(first, second)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized_mixtral(), tmp_path / "other")
    assert torch.equal(logits(loaded), second)


def test_broken_factors_are_not_merged_safely():
    model = adapted()
    experts = model.base_model.model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert isinstance(model.base_model.model.model.layers[0].mlp.experts.get_base_layer(), nf4.QuantExperts)
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_peft_does_not_do_there(options):
    with pytest.raises(ValueError, match="does not work"):
        peft.get_peft_model(quantized_mixtral(), config(**options))


def test_a_layer_s_name_in_target_modules_passes_over_the_experts():
    """Dense experts have their weights as parameters, which target_modules does not reach."""
    targets = ["q_proj", "down_proj", "gate_up_proj"]
    ours = peft.get_peft_model(quantized_mixtral(), config(target_modules=targets, target_parameters=None))
    theirs = peft.get_peft_model(mixtral(), config(target_modules=targets, target_parameters=None))
    names = [
        {name for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}
        for model in (ours, theirs)
    ]
    assert names[0] == names[1]
    assert names[0]


def test_compiles_as_one_graph():
    model = adapted()
    experts = model.base_model.model.model.layers[0].mlp.experts
    x = torch.randn(6, 64)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    weights = torch.rand(6, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index, weights), experts(x, index, weights), rtol=1e-5, atol=1e-5)


def test_transposed_experts_with_biases(tmp_path):
    """gpt-oss's: the adapter's file, its training and its merge are those of the dense experts."""
    options = {**EXPERTS, "head_dim": 16}

    def quantized():
        model = tiny.make("GptOssForCausalLM", dtype=torch.float32, **options)
        nf4.quantize_model(model, progress=False)
        return model

    dense = quantized()
    nf4.merge_model(dense)
    model = peft.get_peft_model(quantized(), config())
    fill_adapters(model)
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(dense, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(model.eval()), logits(twin.eval()), rtol=1e-4, atol=1e-4)
    for each in (model, twin):
        each(input_ids=tiny.IDS).logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
    expected = logits(model)
    merged = model.merge_and_unload()
    experts = merged.model.layers[0].mlp.experts
    assert type(experts).__name__ == "GptOssExperts"
    assert experts.gate_up_proj.shape == (4, 64, 2 * experts.down_proj.shape[1])
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
