"""merge_and_unload, merge_adapter and unmerge_adapter on layers in 4 bits, and what merge_into makes of them."""

import copy
import warnings

import pytest
import torch
from support import tiny
from support.peft_layers import K, N, One, adapted, dense, fill_adapters, peft, quantized, sum_of_weights
from torch import nn

import nf4kernels as nf4
from nf4kernels.integrations.peft import LoraQuantLinear, merge_into

X = torch.randn(6, K, generator=torch.Generator().manual_seed(0))
OPTIONS = [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}]
IDS = ["lora", "rslora", "dora", "bias"]


def delta(layer, name="default"):
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.scaling[name] * B.float() @ A.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_taken_in_fp32_and_rounded_once(dtype):
    model, layer = adapted(quantized(dtype))
    expected = sum_of_weights(layer)
    bias = layer.base_layer.bias
    merged = model.merge_and_unload().layer
    assert type(merged) is nn.Linear
    assert merged.weight.dtype == dtype
    assert merged.bias is bias
    assert not merged.weight.requires_grad
    allowed = torch.finfo(dtype).eps / 2 + 2**-22
    assert ((merged.weight.double() - expected).abs() <= allowed * expected.abs() + 2**-24).all()


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_autocast_around_a_merge_rounds_nothing(options):
    merged, (model, _) = [], adapted(quantized(torch.float32), **options)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            merged.append(copy.deepcopy(model).merge_and_unload().layer.weight)
    assert torch.equal(*merged)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_merged_it_computes_the_same_and_unmerged_it_is_what_it_was(options):
    model, layer = adapted(quantized(), **options)
    packed, before = layer.base_layer, model(X)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert layer.merged
    assert type(layer.base_layer) is nn.Linear
    assert layer.base_layer.weight.dtype == torch.float32
    assert "base_model.model.layer.base_layer.absmax" not in model.state_dict()
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert layer.base_layer is packed
    assert torch.equal(model(X), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(X), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=IDS[:3])
def test_several_adapters_merge_one_by_one_as_at_once(options):
    model, layer = adapted(quantized(), names=("default", "other"), **options)
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    both = model(X)
    model.merge_adapter()
    at_once = layer.base_layer.weight
    torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["other"])
    assert layer.merged_adapters == ["default", "other"]
    assert torch.equal(layer.base_layer.weight, at_once)
    model.unmerge_adapter()
    assert torch.equal(model(X), both)
    one = copy.deepcopy(model).merge_and_unload(adapter_names=["other"])
    model.set_adapter("other")
    torch.testing.assert_close(one(X), model(X), rtol=1e-4, atol=1e-4)


def test_disabled_while_merged_it_is_the_base_again():
    model, layer = adapted(quantized())
    base = layer.base_layer(X)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), base)


def test_while_merged_x_may_have_another_dtype():
    model, _ = adapted(quantized(torch.bfloat16))
    before = model(X)
    model.merge_adapter()
    assert model(X).dtype == before.dtype == torch.float32
    torch.testing.assert_close(model(X), before, rtol=0.02, atol=0.02)


def test_while_merged_it_moves_and_casts():
    model, layer = adapted(quantized())
    bits = layer.base_layer.weight.clone()
    model.merge_adapter()
    model.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, bits)
    assert layer.base_layer.bias.dtype == torch.bfloat16
    assert layer.base_layer.dense_dtype == torch.bfloat16


def broken(value, where="lora_B"):
    """Two layers, the second with one bad number in its adapter."""
    net = nn.Sequential(dense(torch.float16, shape=(64, 64)), dense(torch.float16, shape=(64, 64)))
    model = One(net)
    nf4.quantize_model(model, progress=False)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"]))
    fill_adapters(model)
    with torch.no_grad():
        getattr(model.base_model.model.layer[1], where)["default"].weight[0, 0] = value
    return model


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_a_safe_merge_refuses_and_changes_nothing(method, value):
    """Not even the layers before the broken one."""
    model = broken(value)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights|must fit float16"):
        getattr(model, method)(safe_merge=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) or t.isnan().any() for name, t in before.items())
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraQuantLinear))


def test_a_bias_for_a_layer_without_one_is_refused():
    with pytest.warns(UserWarning, match="has no bias"):
        model, _ = adapted(quantized(bias=False), lora_bias=True)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        model.merge_adapter()


def test_merged_into_the_base():
    torch.manual_seed(5)
    base = One(dense())
    quant = copy.deepcopy(base)
    nf4.quantize_model(quant, progress=False)
    model = peft.get_peft_model(quant, peft.LoraConfig(target_modules=["layer"]))
    fill_adapters(model)
    layer = model.base_model.model.layer
    expected = base.layer.weight + delta(layer)
    before, original = model(X), base.layer.weight.clone()
    with merge_into(base):
        model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, expected, rtol=1e-6, atol=1e-7)
    model.unmerge_adapter()
    assert torch.equal(model(X), before)
    with merge_into(base, dtype=torch.bfloat16):
        merged = model.merge_and_unload()
    assert torch.equal(merged.layer.weight, expected.bfloat16())
    assert torch.equal(base.layer.weight, original)


def test_a_dora_adapter_merged_into_the_base_is_that_adapter_over_it():
    torch.manual_seed(5)
    base = One(dense())
    quant = copy.deepcopy(base)
    nf4.quantize_model(quant, progress=False)
    model = peft.get_peft_model(quant, peft.LoraConfig(target_modules=["layer"], use_dora=True))
    fill_adapters(model)
    over = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["layer"], use_dora=True))
    peft.set_peft_model_state_dict(over, peft.get_peft_model_state_dict(model))
    with merge_into(base):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), over(X), rtol=1e-4, atol=1e-4)


def test_merged_into_4_bits():
    model, layer = adapted(quantized(torch.bfloat16, codebook="fp4", block_size=128), r=2)
    packed, expected = layer.base_layer, sum_of_weights(layer).bfloat16()
    before = model(X)
    with pytest.warns(UserWarning, match="takes most of the fine-tuning away"), merge_into("4bit"):
        model.merge_adapter()
    assert isinstance(layer.base_layer, nf4.QuantLinear)
    again = nf4.quantize(expected, **packed.quant_options)
    assert torch.equal(layer.base_layer.dequantize(), nf4.dequantize(again))
    assert layer.base_layer.dense_dtype == torch.bfloat16
    model.unmerge_adapter()
    assert layer.base_layer is packed
    assert torch.equal(model(X), before)
    with warnings.catch_warnings(), merge_into("dequantized"):
        warnings.simplefilter("error")
        assert type(model.merge_and_unload().layer) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("8bit",), ValueError, "target must be 'dequantized', '4bit' or the dense base model, got '8bit'"),
        ((None,), TypeError, "target must be .*got NoneType"),
        (("dequantized", torch.int8), TypeError, "dtype must be float32"),
        (("4bit", torch.float32), ValueError, "dtype must be None with '4bit'"),
    ],
)
def test_merge_into_refuses(arguments, error, message):
    with pytest.raises(error, match=message), merge_into(*arguments):
        pass


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Sequential(dense()), "base must have a layer layer, got none"),
        (One(dense(shape=(N, K + 1))), r"base must have layer in shape \[160, 192\], got \[160, 193\]"),
        (One(quantized()), "base must have an nn.Linear in floating point as layer"),
        (One(nn.Linear(K, N, device="meta")), "base must be loaded"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(base, message):
    model, layer = adapted(quantized())
    with merge_into(base):
        with pytest.raises(ValueError, match=message):
            model.merge_and_unload()
        with pytest.raises(ValueError, match="the whole model must be merged"):
            layer.merge()
    assert not layer.merged
    assert isinstance(layer.base_layer, nf4.QuantLinear)


def test_a_dispatched_layer_merges_and_an_offloaded_one_refuses():
    hooks = pytest.importorskip("accelerate.hooks")
    model, layer = adapted(quantized())
    before = model(X)
    hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert torch.equal(model(X), before)
    model.merge_adapter()
    assert hasattr(layer.base_layer, "_hf_hook")
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(X), before)
    hooks.remove_hook_from_module(layer.base_layer)
    weights = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
    hook = hooks.AlignDevicesHook("cpu", offload=True, weights_map=weights, offload_buffers=True)
    hooks.add_hook_to_module(layer.base_layer, hook)
    assert torch.equal(model(X), before)
    with pytest.raises(ValueError, match="got one that accelerate has offloaded"):
        model.merge_adapter()
    assert not layer.merged


class Quantizer:
    """What transformers keeps of a model that was loaded in 4 bits."""

    class quantization_config:  # noqa: N801
        quant_method = "nf4kernels"

    def forget(self, model):
        pass

    def remove_quantization_config(self, model):
        del model.hf_quantizer
        model.is_quantized = False


def test_a_merged_model_is_no_quantized_one_for_transformers():
    def make(targets):
        model = tiny.quantized_llama()
        model.hf_quantizer, model.is_quantized = Quantizer(), True
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))

    whole = make("all-linear").merge_and_unload()
    assert not whole.is_quantized
    assert not hasattr(whole, "hf_quantizer")
    part = make(["q_proj"]).merge_and_unload()
    assert part.is_quantized
    assert make("all-linear").unload().is_quantized


def test_what_peft_has_merged_into_is_not_quantized():
    """Its bytes would keep the adapter, and PEFT would take it out of them as if they were numbers."""
    model, layer = adapted(dense())
    x = torch.randn(3, layer.in_features)
    model.merge_adapter()
    expected = model(x)
    report = nf4.quantize_model(model, progress=False)
    assert [(each.name, each.reason) for each in report.skipped if "base_layer" in each.name] == [
        (
            "base_model.model.layer.base_layer",
            "PEFT has merged adapters into it: unmerge_adapter() or merge_and_unload() first",
        )
    ]
    assert torch.equal(model(x), expected)
    model.unmerge_adapter()
    assert nf4.quantize_model(model, progress=False).layers
