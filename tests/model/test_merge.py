"""merge_model: the sum in fp32 rounded once, into Ŵ or into the base, and errors that change nothing."""

import copy

import pytest
import torch
from support.small_model import OPTIONS, QUANTIZED, Net
from support.unchanged import assert_unchanged, snapshot
from torch import nn

import nf4kernels as nf4


def adapted(dtype=torch.float32):
    model = Net().to(dtype)
    base = copy.deepcopy(model)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), **OPTIONS)
    with torch.no_grad():
        for name in QUANTIZED:
            model.get_submodule(name).lora_B.weight.normal_(std=0.05)
    return model, base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("into_base", [False, True])
def test_merge_is_the_fp32_sum_rounded_once(dtype, into_base):
    model, base = adapted()
    expected = {}
    for name in QUANTIZED:
        layer = model.get_submodule(name)
        weight = base.get_submodule(name).weight.detach() if into_base else layer.dequantize(torch.float32)
        delta = layer.lora.scaling * (layer.lora_B.weight @ layer.lora_A.weight).detach()
        expected[name] = (weight + delta).to(dtype), None if layer.bias is None else layer.bias.detach().to(dtype)
    base_before = snapshot(base)
    assert nf4.merge_model(model, base if into_base else None, dtype) == QUANTIZED
    for name, (weight, bias) in expected.items():
        merged = model.get_submodule(name)
        assert type(merged) is nn.Linear
        assert (merged.in_features, merged.out_features) == (weight.shape[1], weight.shape[0])
        assert torch.equal(merged.weight, weight)
        assert merged.bias is None if bias is None else torch.equal(merged.bias, bias)
        assert merged.weight.requires_grad
    assert_unchanged(base, base_before)
    assert nf4.merge_model(model) == []


def test_merge_into_base_without_adapter_gives_the_base_back():
    model = Net()
    base = copy.deepcopy(model)
    nf4.quantize_model(model, **OPTIONS)
    nf4.merge_model(model, base, torch.float32)
    for (name, tensor), (base_name, expected) in zip(model.state_dict().items(), base.state_dict().items()):
        assert name == base_name
        assert torch.equal(tensor, expected)
    model.down.weight.data.zero_()
    assert base.down.weight.abs().sum() > 0, "the merged weight shares the base's memory"


def test_merged_model_computes_what_the_adapted_one_did():
    model, _ = adapted()
    ids = torch.randint(0, 50, (2, 5))
    expected = model(ids)
    nf4.merge_model(model, dtype=torch.float32)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=96 * 2**-22 * expected.abs().max().item())


def break_base(base, how):
    if how == "missing":
        del base.down
    elif how == "shape":
        base.down = nn.Linear(96, 63)
    elif how == "quantized":
        base.down = nf4.QuantLinear(96, 64)
    elif how == "kind":
        base.down = nn.Conv1d(96, 64, 1)
    elif how == "meta":
        base.down.to("meta")
    return base


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "base must have a layer down, got none"),
        ("shape", r"base must have down in shape \[64, 96\], got \[63, 96\]"),
        ("quantized", "base must have an nn.Linear in floating point as down, got QuantLinear"),
        ("kind", "base must have an nn.Linear in floating point as down, got Conv1d"),
        ("meta", "base must be loaded, got down on the meta device"),
    ],
)
def test_merge_with_a_wrong_base_changes_nothing(how, message):
    model, base = adapted()
    base, before = break_base(base, how), snapshot(model)
    with pytest.raises(ValueError, match=message):
        nf4.merge_model(model, base)
    assert_unchanged(model, before)


def test_merge_bad_arguments_change_nothing():
    model, _ = adapted()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"dtype must be float32, bfloat16, float16 or None, got torch.int8"):
        nf4.merge_model(model, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"base must be an nn.Module, got dict"):
        nf4.merge_model(model, base={})
    assert_unchanged(model, before)
