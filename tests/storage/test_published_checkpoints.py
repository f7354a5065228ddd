"""Whole models that others publish in 4 bits: loaded, used, saved, and converted there and back."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from support import directories, published, tiny

import nf4kernels as nf4
from nf4kernels.cli import main

LAYOUTS = ["modelopt", "compressed_int4", "gptq_act_order", "gptq_v2"]
FAMILIES = {"Qwen3-MoE": "compressed_nvfp4", "gpt-oss": "gpt_oss"}


def make(family):
    class_name, usual = directories.FAMILIES[family]
    return tiny.make(class_name, dtype=torch.bfloat16, **usual)


def published_pair(directory, family, layout):
    """(the directory, a dense model of the same numbers)."""
    return directory, published.publish(directory, make(family), layout)


def load(family, directory):
    model = make(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*scales of activations")
        nf4.load_checkpoint(model, directory)
    return model


def assert_same_numbers(model, twin):
    """Merged, it is the dense twin to the last bit."""
    nf4.merge_model(model)
    assert directories.same_state(model, twin)


def same(ours, theirs) -> bool:
    """Bit for bit, by the same names; E8M0's codebook has a NaN."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num())
        for name in ours
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_llama_in_every_kind_of_layout(tmp_path, layout):
    directory, twin = published_pair(tmp_path / "published", "Llama", layout)
    model = load("Llama", directory)
    assert len(tiny.layers(model)) == 14
    torch.testing.assert_close(directories.logits(model), directories.logits(twin), atol=6e-3, rtol=0)
    nf4.save_checkpoint(model, tmp_path / "saved.safetensors")
    assert same(load("Llama", tmp_path / "saved.safetensors").state_dict(), model.state_dict())
    assert_same_numbers(model, twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_fused_as_the_model_has_them(tmp_path, family):
    directory, twin = published_pair(tmp_path / "published", family, FAMILIES[family])
    model = load(family, directory)
    experts = [module for module in model.modules() if isinstance(module, nf4.QuantExperts)]
    assert len(experts) == 2
    torch.testing.assert_close(directories.logits(model), directories.logits(twin), atol=6e-3, rtol=0)
    nf4.save_checkpoint(model, tmp_path / "saved.safetensors")
    assert same(load(family, tmp_path / "saved.safetensors").state_dict(), model.state_dict())
    assert_same_numbers(model, twin)


def test_gate_and_up_keep_their_own_whole_scales(tmp_path):
    """Two fp32 scales meet in one table: bit 7 of a scale's byte says which."""
    directory, twin = published_pair(tmp_path, "Qwen3-MoE", "modelopt")
    part = next(m for m in load("Qwen3-MoE", directory).modules() if isinstance(m, nf4.QuantExperts)).gate_up_proj
    upper = part.absmax >= 128
    half = part.out_features // 2
    assert upper[:, half:].all()
    assert not upper[:, :half].any()
    file = load_file(directory / "model.safetensors")
    for expert in range(part.num_experts):
        key = f"model.layers.0.mlp.experts.{expert}"
        for at, name in ((0, "gate_proj"), (128, "up_proj")):
            e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
            assert torch.equal(part.scale_code[expert, at : at + 127], e4m3 * file[f"{key}.{name}.weight_scale_2"])
    assert torch.equal(part.dequantize(torch.bfloat16), twin.model.layers[0].mlp.experts.gate_up_proj)


def test_scales_of_activations_are_left_out_with_a_word(tmp_path):
    directory, _ = published_pair(tmp_path, "Llama", "modelopt")
    with pytest.warns(UserWarning, match=r"scales of activations are left out: .*input_scale.* and \d+ more"):
        nf4.load_checkpoint(make("Llama"), directory)


def test_it_trains_with_adapters_as_the_dense_twin(tmp_path):
    directory, _ = published_pair(tmp_path, "Llama", "gptq_act_order")
    twin = load("Llama", directory)
    nf4.merge_model(twin, dtype=torch.float32)  # the twin in bf16 has rounded
    losses = []
    for model in (load("Llama", directory).float(), with_terms(twin.float())):
        for layer in tiny.layers(model).values():
            layer.add_lora(nf4.LoraConfig(r=4, alpha=8), dtype=torch.float32)
        for layer in [module for module in model.modules() if hasattr(module, "lora_A")]:
            torch.manual_seed(0)
            layer.lora_A.weight.data.normal_()
        optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "lora_" in name], lr=0.5)
        for _ in range(3):
            loss = model(tiny.IDS, labels=tiny.IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert losses[2] < losses[0] - 1e-2


def with_terms(model):
    """The dense model with a LoRA term of plain layers beside each of its own."""
    for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]:
        lora_A, lora_B = (
            torch.nn.Linear(k, n, bias=False) for k, n in ((layer.in_features, 4), (4, layer.out_features))
        )
        torch.nn.init.zeros_(lora_B.weight)
        layer.lora_A, layer.lora_B = lora_A, lora_B
        layer.register_forward_hook(lambda layer, x, y: y + 2 * layer.lora_B(layer.lora_A(x[0])))
    return model


@pytest.mark.parametrize(("family", "layout"), [("Llama", "compressed_mxfp4"), ("gpt-oss", "gpt_oss")])
def test_mxfp4_is_converted_there_and_back_byte_for_byte(tmp_path, capsys, family, layout):
    directory, twin = published_pair(tmp_path / "published", family, layout)
    (directory / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    for file in (directory / "names").iterdir():
        file.unlink()
    assert main(["convert", str(directory), str(tmp_path / "ours")]) == 0
    assert "weights in mxfp4, none of them changed" in capsys.readouterr().out
    assert (tmp_path / "ours" / "tokenizer_config.json").exists()
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "mxfp4"]) == 0
    assert same(load_file(tmp_path / "back" / "model.safetensors"), load_file(directory / "model.safetensors"))
    assert_same_numbers(load(family, tmp_path / "ours"), twin)
    assert_same_numbers(load(family, tmp_path / "back"), twin)


def test_a_conversion_is_in_several_files_where_one_is_too_large(tmp_path, monkeypatch):
    directory, twin = published_pair(tmp_path / "published", "Llama", "compressed_int4")
    monkeypatch.setattr("nf4kernels.storage.convert_published.SHARD", 20_000)
    assert main(["convert", str(directory), str(tmp_path / "ours")]) == 0
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert_same_numbers(load("Llama", tmp_path / "ours"), twin)
