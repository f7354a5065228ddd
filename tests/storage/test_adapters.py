"""Adapters: PEFT reads ours and we read PEFT's, and refused files change nothing."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nf4kernels as nf4

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(32, 32, bias=False)
        self.up_proj = nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.lm_head = nn.Linear(32, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in ("q_proj", "up_proj", "down_proj")]


def quantized(lora=None, skip=("lm_head",)):
    model = Net()
    nf4.quantize_model(model, skip=skip, lora=lora, progress=False)
    return model


def randomize(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


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


def set_lora(model, names, **config):
    for name in names:
        layer = model.get_submodule(name)
        layer.lora = layer.lora_A = layer.lora_B = None
        layer.add_lora(nf4.LoraConfig(**config), dtype=torch.float32)


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
    config = json.loads((tmp_path / "new" / "directory" / CONFIG).read_text())
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


def snapshot(model):
    return copy.deepcopy(model.state_dict()), {
        name: layer.lora for name, layer in model.named_modules() if isinstance(layer, nf4.QuantLinear)
    }


def assert_unchanged(model, before):
    state, configs = snapshot(model)
    assert configs == before[1]
    assert list(state) == list(before[0])
    assert all(torch.equal(state[name], tensor) for name, tensor in before[0].items())


def config_with(**changes):
    def damage(directory):
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **changes}))

    return damage


def tensors_with(change):
    def damage(directory):
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return damage


def key(layer, factor):
    return f"base_model.model.{layer}.lora_{factor}.weight"


def drop_layer(tensors):
    for factor in "AB":
        tensors.pop(key("blocks.0.q_proj", factor))


def cut(directory):
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-9])


Q = "blocks.0.q_proj"
BAD = {
    "not json": (lambda d: (d / CONFIG).write_text("{"), "adapter_config.json must hold PEFT's configuration"),
    "json list": (lambda d: (d / CONFIG).write_text("[]"), "adapter_config.json must hold PEFT's configuration"),
    "no rank": (lambda d: (d / CONFIG).write_text('{"peft_type": "LORA"}'), "must hold PEFT's configuration"),
    "other type": (config_with(peft_type="IA3"), "peft_type in .* must be 'LORA'"),
    "dora": (config_with(use_dora=True), "use_dora in .* must be unset"),
    "lora_bias": (config_with(lora_bias=True), "lora_bias in .* must be unset"),
    "bias": (config_with(bias="all"), "bias in .* must be unset, it is not supported; got 'all'"),
    "modules_to_save": (config_with(modules_to_save=["lm_head"]), "modules_to_save in .* must be unset"),
    "target_parameters": (config_with(target_parameters=["x"]), "target_parameters in .* must be unset"),
    "replication": (config_with(layer_replication=[[0, 2]]), "layer_replication in .* must be unset"),
    "from the future": (config_with(use_new_thing={"a": 1}), "use_new_thing in .* must be unset"),
    "pissa": (config_with(init_lora_weights="pissa"), "init_lora_weights in .* must leave the base weight as it is"),
    "bad rank": (config_with(r=-1), "r must be at least 1, got -1"),
    "text rank": (config_with(r="four"), "the settings of .* must make a LoraConfig"),
    "bad dropout": (config_with(lora_dropout=2), r"dropout must be in \[0, 1\), got 2"),
    "bad pattern": (config_with(rank_pattern=["a"]), "peft_type in .* must be 'LORA', with r and lora_alpha"),
    "rank disagrees": (config_with(r=8), r"lora_A and lora_B of blocks.0.down_proj must be \[8, K\] and \[N, 8\]"),
    "truncated": (cut, "adapter_model.safetensors must be a whole safetensors file"),
    "empty": (lambda d: save_file({}, d / WEIGHTS), "must hold an adapter, got no tensor"),
    "half a pair": (
        tensors_with(lambda t: t.pop(key(Q, "A"))),
        f"must hold lora_A and lora_B of {Q}, got lora_B alone",
    ),
    "unknown key": (tensors_with(lambda t: t.update(extra=torch.ones(1))), "got extra"),
    "magnitude": (
        tensors_with(lambda t: t.update({f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(32)})),
        "got .*lora_magnitude_vector",
    ),
    "not a layer": (
        tensors_with(
            lambda t: t.update({key("lm_head", "A"): torch.ones(4, 32), key("lm_head", "B"): torch.ones(10, 4)})
        ),
        "model must have a QuantLinear as lm_head, got none",
    ),
    "wrong K": (tensors_with(lambda t: t.update({key(Q, "A"): torch.ones(4, 31)})), rf"{Q} must be for \[32, 32\]"),
    "wrong N": (tensors_with(lambda t: t.update({key(Q, "B"): torch.ones(31, 4)})), rf"{Q} must be for \[32, 32\]"),
    "1-D": (tensors_with(lambda t: t.update({key(Q, "B"): torch.ones(32)})), rf"lora_A and lora_B of {Q} must be"),
    "integers": (
        tensors_with(lambda t: t.update({key(Q, "B"): torch.ones(32, 4, dtype=torch.int64)})),
        f"{Q} must be floating point",
    ),
}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_change_nothing(case, attached, tmp_path):
    damage, message = BAD[case]
    nf4.save_adapters(randomize(quantized(nf4.LoraConfig(r=4, alpha=8))), tmp_path)
    damage(tmp_path)
    model = quantized(nf4.LoraConfig(r=4) if attached else None)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"nf4kernels\.load_adapters: .*{message}"):
        nf4.load_adapters(model, tmp_path)
    assert_unchanged(model, before)


def test_adapter_of_another_rank_is_refused(tmp_path):
    nf4.save_adapters(quantized(nf4.LoraConfig(r=4)), tmp_path)
    model = quantized(nf4.LoraConfig(r=8))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the adapter of .* must have rank 8, got 4"):
        nf4.load_adapters(model, tmp_path)
    assert_unchanged(model, before)


def test_adapted_layer_without_one_in_the_file_is_refused(tmp_path):
    nf4.save_adapters(quantized(nf4.LoraConfig(r=4)), tmp_path)
    tensors_with(drop_layer)(tmp_path)
    model = quantized(nf4.LoraConfig(r=4))
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape("got none for ['blocks.0.q_proj']")):
        nf4.load_adapters(model, tmp_path)
    assert_unchanged(model, before)
    nf4.load_adapters(quantized(), tmp_path)  # where no layer has one, the rest may stay without


def test_one_layer_under_two_names(tmp_path):
    model = randomize(quantized(nf4.LoraConfig(r=4)))
    model.again = model.blocks[0].q_proj
    nf4.save_adapters(model, tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 2 * len(LAYERS)
    other = quantized()
    other.again = other.blocks[0].q_proj
    nf4.load_adapters(other, tmp_path)
    assert torch.equal(other.again.lora_B.weight, model.again.lora_B.weight)
    twice = tensors_with(lambda t: t.update({key("again", f): t[key(Q, f)].clone() for f in "AB"}))
    twice(tmp_path)
    with pytest.raises(ValueError, match=r"one adapter a layer, got a second one as (again|blocks\.0\.q_proj)"):
        nf4.load_adapters(other, tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(name, tmp_path):
    nf4.save_adapters(quantized(nf4.LoraConfig(r=4)), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"directory must have {re.escape(name)}"):
        nf4.load_adapters(quantized(), tmp_path)


def mixed(**second):
    model = quantized(nf4.LoraConfig(r=4, dropout=0.1))
    set_lora(model, [Q], **{"r": 4, "dropout": 0.1, **second})
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (dict, TypeError, r"model must be an nn\.Module, got dict"),
        (quantized, ValueError, "model must have a QuantLinear with an adapter, got none"),
        (lambda: nf4.QuantLinear(4, 4, lora=nf4.LoraConfig(r=2)), ValueError, "model must contain its layers"),
        (lambda: mixed(dropout=0.2), ValueError, r"dropout must be the same in every layer .* got \[0\.1, 0\.2\]"),
        (lambda: mixed(use_rslora=True), ValueError, "use_rslora must be the same in every layer"),
        (lambda: quantized(nf4.LoraConfig(r=4)).to("meta"), ValueError, "model must be loaded, got .* meta device"),
    ],
)
def test_what_cannot_be_saved_writes_nothing(make, error, message, tmp_path):
    with pytest.raises(error, match=rf"nf4kernels\.save_adapters: {message}"):
        nf4.save_adapters(make(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    nf4.save_adapters(quantized(nf4.LoraConfig(r=4)), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("nf4kernels.storage.adapters.save_file", half)
    with pytest.raises(OSError, match="No space left"):
        nf4.save_adapters(quantized(nf4.LoraConfig(r=8)), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_load_needs_a_module(tmp_path):
    with pytest.raises(TypeError, match=r"load_adapters: model must be an nn\.Module, got list"):
        nf4.load_adapters([], tmp_path)
