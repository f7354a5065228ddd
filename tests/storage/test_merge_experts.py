"""Adapters of fused experts (PEFT's target_parameters) merged file by file, against PEFT's products in the model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.directories import dense_directory, load
from support.llama_directory import all_tensors, tree
from support.peft_adapter import peft, save_adapter
from transformers import core_model_loading

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.cli.meta_model import meta_model
from nf4kernels.integrations.transformers import Nf4Config
from nf4kernels.storage.convert import convert_directory
from nf4kernels.storage.directory_checks import ConversionError
from nf4kernels.storage.merge_adapter import Recipe, merge_adapter

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES = ("Mixtral", "Qwen3-MoE", "gpt-oss")


def merge(adapter, base, out, **options):
    return merge_adapter(adapter, base, out, **{"model_of": meta_model, "progress": False, **options})


def save_experts_adapter(base, directory, targets=tuple(BOTH), **settings):
    options = {"target_modules": ["q_proj"], "target_parameters": list(targets), **settings}
    return save_adapter(base, directory, scale=0.2, **options)


def expected_model(base, adapter, dtype):
    """The dense model plus PEFT's own products, summed in fp32 and rounded once."""
    model = peft.PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter)
    return model.merge_and_unload().to(dtype)


def saved_tensors(model, directory):
    """As transformers writes the model's files."""
    model.save_pretrained(directory)
    return all_tensors(directory)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("targets", "dtype"), [(BOTH, torch.float32), (BOTH[:1], torch.bfloat16)], ids=["both", "one"])
def test_is_what_peft_makes_of_the_model(family, targets, dtype, tmp_path):
    base = dense_directory(tmp_path / "base", family, dtype)
    adapter = save_experts_adapter(base, tmp_path / "adapter", targets)
    done = merge(adapter, base, tmp_path / "out", max_shard_size=100_000)
    assert (done.layers, done.experts) == (2, 2 * len(targets))
    found, before = all_tensors(tmp_path / "out"), all_tensors(base)
    expected = saved_tensors(expected_model(base, adapter, dtype), tmp_path / "expected")
    assert found.keys() == expected.keys() == before.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], tensor, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    changed = [name for name in before if not torch.equal(found[name], before[name])]
    of_experts = [name for name in before if "experts" in name and "bias" not in name]
    share = 1 if len(targets) == 2 else 2 / 3 if family != "gpt-oss" else 1 / 2
    assert len(changed) == 2 + round(share * len(of_experts))
    assert tree(tmp_path / "out").count("model.safetensors.index.json") == 1
    load(tmp_path / "out")


def test_into_4_bits_measures_the_experts(tmp_path):
    base = dense_directory(tmp_path / "base", "Mixtral")
    adapter = save_experts_adapter(base, tmp_path / "adapter")
    done = merge(adapter, base, tmp_path / "out", into="4bit", recipe=Recipe(block_size=32))
    merge(adapter, base, tmp_path / "dense")
    convert_directory(tmp_path / "dense", tmp_path / "expected", block_size=32, model_of=meta_model, progress=False)
    found, expected = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert done.survival.unmeasured == []
    name = "model.layers.1.mlp.experts.down_proj"
    before, after = (load(tmp_path / each).get_parameter(name).detach() for each in ("base", "dense"))
    delta = torch.zeros_like(before, dtype=torch.float32)
    stored = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.experts"  # the outer wrapper is that of the last parameter
    A, B = stored[f"{key}.lora_A.weight"].unflatten(0, (4, -1)), stored[f"{key}.lora_B.weight"].unflatten(1, (-1, 4))
    delta = torch.einsum("nre,erk->enk", B, A) * 2
    change = sum(
        sign * torch.stack([nf4.dequantize(q, torch.float32) for q in nf4.quantize_experts(w, block_size=32)])
        for sign, w in ((1, after), (-1, before))
    )
    assert done.survival.layers[name] == pytest.approx(((change - delta).norm() / delta.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["names", "values"])
def test_rules_that_do_not_lead_back_are_refused(kind, tmp_path, monkeypatch):
    """What transformers takes apart is put together again and compared, so that no matrix lands in another's place."""
    base = dense_directory(tmp_path / "base", "Mixtral")
    adapter = save_experts_adapter(base, tmp_path / "adapter")
    original = core_model_loading.revert_weight_conversion

    def revert(model, state):
        found = original(model, state)
        names = sorted(found)
        renamed = dict(zip(names, [*names[1:], names[0]])) if kind == "values" else {n: f"{n}.other" for n in names}
        return {renamed[name]: tensor for name, tensor in found.items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", revert)
    with pytest.raises(ConversionError, match=r"must be put together again from .* by transformers' rules"):
        merge(adapter, base, tmp_path / "out")
    monkeypatch.setattr("nf4kernels.storage.merge_experts.take_apart", lambda model, name, tensor: {name: tensor})
    with pytest.raises(ConversionError, match=r"must be taken apart as the files have it .* got model\.layers\.0\.mlp"):
        merge(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def packed_directory(base, directory, by):
    """The base in 4 bits, with the file's names around the experts or with the model's."""
    if by == "quantize":
        assert main(["quantize", str(base), str(directory), "--block-size", "32"]) == 0
    else:
        load(base, quantization_config=Nf4Config(block_size=32)).save_pretrained(directory)
    return directory


def decoded(directory):
    """The model with Ŵ in fp32."""
    model = load(directory)
    nf4.merge_model(model, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["quantize", "save_pretrained"])
def test_experts_in_4_bits_are_decoded(family, by, tmp_path):
    """By export, and by a merge into them, which adds to Ŵ in fp32 and rounds once."""
    base = dense_directory(tmp_path / "base", family)
    adapter = save_experts_adapter(base, tmp_path / "adapter")
    packed = packed_directory(base, tmp_path / "packed", by)
    assert main(["export", str(packed), str(tmp_path / "dense"), "--to", "safetensors"]) == 0
    expected = decoded(packed)
    found = all_tensors(tmp_path / "dense")
    if by == "quantize":
        assert found.keys() == all_tensors(base).keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    state, wanted = load(tmp_path / "dense").state_dict(), expected.state_dict()
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in wanted.items())

    done = merge(adapter, packed, tmp_path / "out", into="dequantized")
    assert (done.layers, done.experts) == (2, 4)
    model = peft.PeftModel.from_pretrained(expected, adapter).merge_and_unload().bfloat16()
    state = load(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=8e-3, atol=1e-6)
    if by == "quantize":
        merge(adapter, base, tmp_path / "other", into="dequantized", recipe=Recipe(block_size=32))
        other = all_tensors(tmp_path / "other")
        assert all(torch.equal(other[name], tensor) for name, tensor in all_tensors(tmp_path / "out").items())


def test_experts_in_4_bits_are_rounded_again(tmp_path, capsys):
    base = dense_directory(tmp_path / "base", "Mixtral")
    adapter = save_experts_adapter(base, tmp_path / "adapter")
    packed = packed_directory(base, tmp_path / "packed", "quantize")
    done = merge(adapter, packed, tmp_path / "out", into="4bit")
    merge(adapter, packed, tmp_path / "dense", into="dequantized")
    convert_directory(tmp_path / "dense", tmp_path / "expected", block_size=32, model_of=meta_model, progress=False)
    found, expected = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert "model.layers.0.mlp.experts.down_proj.weight" in found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(done.survival.layers) == 6
    assert 0 < done.survival.error < 1
    assert main(["convert", str(packed), str(tmp_path / "theirs"), "--to", "bitsandbytes"]) == 2
    assert "SRC must have no experts in 4 bits, for which bitsandbytes has no format" in capsys.readouterr().err


def test_damaged_experts_in_4_bits(tmp_path, capsys):
    packed = packed_directory(dense_directory(tmp_path / "base", "Mixtral"), tmp_path / "packed", "quantize")
    key = "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(packed / "model.safetensors")
    tensors[f"{key}.absmax"] = tensors[f"{key}.absmax"][:, :-1].contiguous()
    save_file(tensors, packed / "model.safetensors")
    assert main(["export", str(packed), str(tmp_path / "out"), "--to", "safetensors"]) == 2
    assert f"nf4kernels export: {key}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def damage(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_refused(tmp_path, capsys):
    base = dense_directory(tmp_path / "base", "Mixtral")
    adapter = save_experts_adapter(base, tmp_path / "adapter")
    other = dense_directory(tmp_path / "other", "Mixtral", intermediate_size=64)
    llama = dense_directory(tmp_path / "llama")
    before = tree(tmp_path)
    capsys.readouterr()
    for given, message in (
        (other, "mlp.experts.gate_up_proj must have an adapter of shapes"),
        (llama, "must name weights of the model's experts that have an adapter in the file"),
    ):
        assert main(["merge", str(adapter), str(tmp_path / "out"), "--base", str(given)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConversionError, match="transformers must be installed and know the model to merge an adapter"):
        merge(adapter, base, tmp_path / "out", model_of=None)
    damage(adapter, lambda t: t.pop("base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"))
    assert main(["merge", str(adapter), str(tmp_path / "out")]) == 2
    assert "must hold lora_A and lora_B of model.layers.1.mlp.experts.base_layer" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_the_command_says_what_was_merged(tmp_path, capsys):
    base = dense_directory(tmp_path / "base", "Mixtral")
    adapter = save_experts_adapter(base, tmp_path / "adapter", target_modules=[])
    assert main(["merge", str(adapter), str(tmp_path / "out")]) == 0
    assert "merged the adapter's 4 weights of experts into the weights of" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
