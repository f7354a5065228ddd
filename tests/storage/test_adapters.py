"""LoRA adapters on disk, ours and PEFT's, read by either."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.adapted_model import CONFIG, LAYERS, WEIGHTS, Net, quantized, randomize, set_lora
from torch import nn

import nf4kernels as nf4


def dense_twin(model):
    """A dense model with Ŵ in fp32 and no adapter, for PEFT to put its own onto."""
    twin = Net()
    for name, layer in model.named_modules():
        if isinstance(layer, nf4.QuantLinear):
            twin.get_submodule(name).weight.data = layer.dequantize(torch.float32)
            if layer.bias is not None:
                twin.get_submodule(name).bias.data = layer.bias.data.clone()
    twin.lm_head.load_state_dict(model.lm_head.state_dict())
    return twin


def assert_same_outputs(model, other):
    x = torch.randn(5, 32)
    with torch.no_grad():
        got, expected = model.eval()(x), other.eval()(x)
    # Fewer than 64 terms a product and 14 products one after the other, in fp32, summed in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=14 * 64 * 2**-24 * expected.abs().max().item())


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed: no adapter is compared to it")


def plain(model):
    set_lora(model, LAYERS, r=4, alpha=8)


def rslora(model):
    set_lora(model, LAYERS, r=4, alpha=8, use_rslora=True, dropout=0.1)


def ranks_and_alphas(model):
    set_lora(model, LAYERS, r=4, alpha=8)
    set_lora(model, ["blocks.0.q_proj"], r=2, alpha=8)
    set_lora(model, ["blocks.1.q_proj", "blocks.1.up_proj"], r=8, alpha=2.5)


def some_kinds(model):
    set_lora(model, [name for name in LAYERS if "q_proj" in name or "down_proj" in name], r=4)


def some_layers(model):
    set_lora(model, ["blocks.0.q_proj", "blocks.1.up_proj"], r=4)


def one_layer_rslora(model):
    set_lora(model, ["blocks.1.up_proj"], r=16, alpha=1, use_rslora=True)


@pytest.mark.parametrize("arrange", [plain, rslora, ranks_and_alphas, some_kinds, some_layers, one_layer_rslora])
def test_peft_reads_ours(peft, arrange, tmp_path):
    model = quantized()
    arrange(model)
    randomize(model)
    nf4.save_adapters(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    theirs = peft.PeftModel.from_pretrained(dense_twin(model), tmp_path)
    assert_same_outputs(model, theirs)
    found = {name: module for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, nf4.QuantLinear) and m.lora is not None}
    assert found.keys() == adapted.keys(), "PEFT put adapters on other layers"
    for name, layer in adapted.items():
        assert found[name].r["default"] == layer.lora.r
        assert found[name].scaling["default"] == layer.lora.scaling
        assert torch.equal(found[name].lora_A["default"].weight, layer.lora_A.weight)
        assert torch.equal(found[name].lora_B["default"].weight, layer.lora_B.weight)


PEFT_OPTIONS = {
    "all-linear": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    "rslora": {"r": 9, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian", "target_modules": ["q_proj"], "lora_dropout": 0.25},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {"0.q_proj": 2, "1.up_proj": 3, "blocks.1.down_proj": 5},
        "alpha_pattern": {"^blocks.1.down_proj": 32, r"blocks\.\d+\.q_proj": 1},
    },
    "regular expression": {"r": 4, "target_modules": r".*\.1\.(q|up)_proj"},
}


@pytest.mark.parametrize("case", PEFT_OPTIONS)
@pytest.mark.parametrize("attached", [False, True])
def test_we_read_pefts(peft, case, attached, tmp_path):
    model = quantized()
    theirs = randomize(peft.get_peft_model(dense_twin(model), peft.LoraConfig(**PEFT_OPTIONS[case])))
    theirs.save_pretrained(tmp_path)
    if attached:
        for name, module in theirs.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                set_lora(model, [name], r=module.r["default"], alpha=99)
    nf4.load_adapters(model, tmp_path)
    assert_same_outputs(model, theirs)
    adapted = [m for m in model.modules() if isinstance(m, nf4.QuantLinear) and m.lora is not None]
    assert all(layer.lora.dropout == PEFT_OPTIONS[case].get("lora_dropout", 0) for layer in adapted)
    assert all(layer.lora_A.weight.requires_grad for layer in adapted)

    # And back: what we write of it, PEFT reads as the same adapter.
    nf4.save_adapters(model, tmp_path / "again")
    first, second = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = peft.PeftModel.from_pretrained(dense_twin(model), tmp_path / "again")
    assert_same_outputs(again, theirs)


def test_names_metadata_and_settings(tmp_path):
    model = randomize(quantized(nf4.LoraConfig(r=4, alpha=8, dropout=0.1, init="gaussian")))
    nf4.save_adapters(model, tmp_path / "new" / "directory")
    with safe_open(tmp_path / "new" / "directory" / WEIGHTS, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        names = set(opened.keys())
    assert names == {f"base_model.model.{layer}.lora_{factor}.weight" for layer in LAYERS for factor in "AB"}
    config = json.loads((tmp_path / "new" / "directory" / CONFIG).read_text(encoding="utf-8"))
    expected = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": False, "bias": "none",
        "target_modules": ["down_proj", "q_proj", "up_proj"], "init_lora_weights": "gaussian", "rank_pattern": {},
        "alpha_pattern": {}, "use_dora": False,
    }  # fmt: skip
    assert expected.items() <= config.items()
    umask = os.umask(0)
    os.umask(umask)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "new" / "directory" / name).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_survives(dtype, tmp_path):
    model = quantized()
    for name in LAYERS:
        model.get_submodule(name).add_lora(nf4.LoraConfig(r=4), dtype=dtype)
    nf4.save_adapters(randomize(model), tmp_path)
    other = quantized()
    nf4.load_adapters(other, tmp_path)
    for name in LAYERS:
        assert other.get_submodule(name).lora_B.weight.dtype == dtype
        assert torch.equal(other.get_submodule(name).lora_B.weight, model.get_submodule(name).lora_B.weight)
        assert torch.equal(other.get_submodule(name).lora_A.weight, model.get_submodule(name).lora_A.weight)


def test_loaded_adapter_can_be_trained(tmp_path):
    nf4.save_adapters(randomize(quantized(nf4.LoraConfig(r=4))), tmp_path)
    model = quantized()
    nf4.load_adapters(model, tmp_path)
    model(torch.randn(3, 32)).sum().backward()
    assert all(model.get_submodule(name).lora_A.weight.grad.abs().sum() > 0 for name in LAYERS)


def test_compiled_model_has_the_same_names(tmp_path):
    model = randomize(quantized(nf4.LoraConfig(r=4)))
    nf4.save_adapters(model, tmp_path / "plain")
    nf4.save_adapters(torch.compile(model), tmp_path / "compiled")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()
    other = torch.compile(quantized())
    nf4.load_adapters(other, tmp_path / "plain")
    assert torch.equal(other._orig_mod.blocks[1].q_proj.lora_B.weight, model.blocks[1].q_proj.lora_B.weight)


def test_layer_whose_name_ends_like_another(peft, tmp_path):
    """ "fc" also ends "inner.fc": PEFT would adapt both from a list of names, and use one rank for both."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.inner = nn.ModuleDict({"fc": nn.Linear(32, 32)})

        def forward(self, x):
            return self.inner["fc"](self.fc(x))

    for ranks in ({"fc": 4}, {"fc": 4, "inner.fc": 2}, {"fc": 2, "inner.fc": 4}):
        model, twin = Nested(), Nested()
        nf4.quantize_model(model, progress=False)
        for name, r in ranks.items():
            model.get_submodule(name).add_lora(nf4.LoraConfig(r=r))
        for name in ("fc", "inner.fc"):
            twin.get_submodule(name).weight.data = model.get_submodule(name).dequantize(torch.float32)
            twin.get_submodule(name).bias.data = model.get_submodule(name).bias.data.clone()
        nf4.save_adapters(randomize(model), tmp_path)
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path)
        assert_same_outputs(model, theirs)
        found = {n: m.r["default"] for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert found == ranks
