"""Adapter files between PEFT, over dense layers, ours and bitsandbytes', and this package's own adapters."""

import copy

import pytest
import torch
from support import tiny
from support.peft_layers import K, adapted, fill_adapters, peft, quantized

import nf4kernels as nf4

PATTERNS = {"rank_pattern": {"q_proj": 3, "layers.0.mlp.down_proj": 6}, "alpha_pattern": {"mlp.*": 5}}
OPTIONS = [{}, {"use_rslora": True}, PATTERNS, {**PATTERNS, "use_rslora": True}]
IDS = ["lora", "rslora", "patterns", "patterns-rslora"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tiny.IDS).logits


def ours():
    """With bitsandbytes' scales, so that all three bases have the same weights."""
    model = tiny.llama()
    nf4.quantize_model(model, progress=False, scale_codebook="dynamic8")
    return model


def dequantized():
    model = ours()
    nf4.merge_model(model)
    return model


def in_bitsandbytes():
    """The same weights in bitsandbytes' layers."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = ours()
    for name, layer in tiny.layers(model).items():
        tensors = nf4.weight_to_tensors(layer.qweight, bitsandbytes=True)
        weight = tensors.pop("weight")
        theirs = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
        theirs.weight = bnb.nn.Params4bit.from_prequantized(weight, tensors, requires_grad=False, device="cpu")
        theirs.support_avx512bf16_for_cpu = False  # it would repack its weight in the first evaluation
        model.set_submodule(name, theirs)
    model.is_loaded_in_4bit = True
    return model


BASES = {"dense": dequantized, "ours": ours, "bitsandbytes": in_bitsandbytes}


def native(options):
    """A model of ours with adapters of its own, by PEFT's words."""
    model = ours()
    for name, layer in tiny.layers(model).items():
        r = 3 if name.endswith("q_proj") else 6 if name.endswith("layers.0.mlp.down_proj") else 4
        changed = "rank_pattern" in options
        alpha = 5 if changed and "mlp." in name else 12
        config = nf4.LoraConfig(r=r if changed else 4, alpha=alpha, use_rslora=options.get("use_rslora", False))
        layer.add_lora(config)
    return filled(model)


def filled(model):
    fill_adapters(model)
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_native_adapters_load_in_peft_over_any_base(tmp_path, options):
    model = native(options)
    nf4.save_adapters(model, tmp_path)
    for name, base in BASES.items():
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4, msg=name)
    assert loaded.base_model.model.model.layers[0].mlp.down_proj.r["default"] == (6 if "rank_pattern" in options else 4)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("base", BASES)
def test_peft_s_adapters_load_natively(tmp_path, base, options):
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **options)
    model = filled(peft.get_peft_model(BASES[base](), config))
    model.save_pretrained(tmp_path)
    loaded = ours()
    nf4.load_adapters(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    theirs = model.base_model.model.model.layers[0].mlp.down_proj
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.lora.scaling == theirs.scaling["default"]
    assert torch.equal(layer.lora_A.weight, theirs.lora_A["default"].weight)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_an_adapter_that_started_from_the_weight_loads_over_the_original(tmp_path, init):
    """Its fresh file changes nothing there, and a trained one by what was trained."""
    dense = tiny.llama()
    model = copy.deepcopy(dense)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4, init=init), progress=False)
    nf4.save_adapters(model, tmp_path)
    for base in (dense, tiny.quantized_llama()):
        expected = logits(base)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
        assert loaded.base_model.model.model.layers[0].mlp.down_proj.r["default"] == 8


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["dora", "head"])
def test_saved_and_loaded_through_peft(tmp_path, options):
    config = peft.LoraConfig(r=4, target_modules="all-linear", **options)
    model = filled(peft.get_peft_model(tiny.quantized_llama(), config))
    if "modules_to_save" in options:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.quantized_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_a_bias_of_lora_b_is_saved_and_loaded(tmp_path):
    model, layer = adapted(quantized(), lora_bias=True)
    with torch.no_grad():
        layer.lora_B["default"].bias.normal_()
    x = torch.randn(3, K)
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(x), expected)


def test_adapters_are_added_combined_and_deleted(tmp_path):
    """As over the dense model of the same weights."""
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    first, second = (filled(peft.get_peft_model(tiny.quantized_llama(), config)) for _ in range(2))
    for name, model in (("first", first), ("second", second)):
        model.save_pretrained(tmp_path / name)
    merged = tiny.quantized_llama()
    nf4.merge_model(merged)
    results = []
    for base in (tiny.quantized_llama(), merged):
        model = peft.PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first")
        model.load_adapter(tmp_path / "second", "second")
        outputs = [logits(model)]
        for kind in ("cat", "linear", "svd"):
            model.add_weighted_adapter(["first", "second"], [0.7, 0.4], kind, kind)
            model.set_adapter(kind)
            outputs.append(logits(model))
        model.delete_adapter("first")
        assert "first" not in model.base_model.model.model.layers[0].mlp.down_proj.lora_A
        model.set_adapter("second")
        outputs.append(logits(model))
        results.append(outputs)
    for ours_, theirs in zip(*results):
        torch.testing.assert_close(ours_, theirs, rtol=1e-3, atol=1e-3)
    assert torch.equal(results[0][0], logits(first))
    assert torch.equal(results[0][-1], logits(second))
