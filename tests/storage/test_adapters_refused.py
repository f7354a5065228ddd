"""Adapters that cannot be saved or loaded: refused by name, and nothing changed."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted_model import CONFIG, LAYERS, WEIGHTS, quantized, randomize, set_lora
from support.unchanged import assert_unchanged, snapshot

import nf4kernels as nf4


def config_with(**changes):
    def damage(directory):
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        (directory / CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return damage


def tensors_with(change):
    def damage(directory):
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return damage


def key(layer, factor):
    return f"base_model.model.{layer}.lora_{factor}.weight"


def cut(directory):
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-9])


Q = "blocks.0.q_proj"
BAD = {
    "not json": (
        lambda d: (d / CONFIG).write_text("{", encoding="utf-8"),
        "adapter_config.json must hold PEFT's configuration",
    ),
    "json list": (
        lambda d: (d / CONFIG).write_text("[]", encoding="utf-8"),
        "adapter_config.json must hold PEFT's configuration",
    ),
    "no rank": (
        lambda d: (d / CONFIG).write_text('{"peft_type": "LORA"}', encoding="utf-8"),
        "must hold PEFT's configuration",
    ),
    "other type": (config_with(peft_type="IA3"), "peft_type in .* must be 'LORA'"),
    "dora": (config_with(use_dora=True), "use_dora in .* must be unset"),
    "lora_bias": (config_with(lora_bias=True), "lora_bias in .* must be unset"),
    "bias": (config_with(bias="all"), "bias in .* must be 'none' where the file holds none, got 'all'"),
    "modules_to_save": (
        config_with(modules_to_save=["lm_head"]),
        "modules_to_save in .* must be in the file, got 'lm_head'",
    ),
    "target_parameters": (
        config_with(target_parameters=["x"]),
        "target_parameters in .* must name weights of .*experts.*, got 'x'",
    ),
    "replication": (config_with(layer_replication=[[0, 2]]), "layer_replication in .* must be unset"),
    "from the future": (config_with(use_new_thing={"a": 1}), "use_new_thing in .* must be unset"),
    "a switch from the future": (config_with(use_new_thing=True), "use_new_thing in .* must be unset"),
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
    "another shape beside": (
        tensors_with(lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(11)})),
        r"lm_head.bias must have shape \[10\], got \[11\]",
    ),
    "4 bits beside": (
        tensors_with(lambda t: t.update({f"base_model.model.{Q}.weight": torch.ones(32, 32)})),
        f"must hold .* dense tensors of the model only, got base_model.model.{Q}.weight",
    ),
    "two adapters": (
        tensors_with(lambda t: t.update({key(Q, "A").replace(".weight", ".other.weight"): torch.ones(4, 32)})),
        r"must hold one adapter, got \['None', 'other'\]",
    ),
    "not a layer": (
        tensors_with(
            lambda t: t.update({key("lm_head", "A"): torch.ones(4, 32), key("lm_head", "B"): torch.ones(10, 4)})
        ),
        "model must have a QuantLinear or experts in 4 bits as lm_head, got none",
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
        (quantized, ValueError, "model must have a layer in 4 bits with an adapter, got none"),
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
