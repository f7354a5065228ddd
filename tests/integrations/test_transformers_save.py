"""save_pretrained of a 4-bit model, and what reads it again."""

import json

import pytest
import torch
from safetensors import safe_open
from support import tiny
from support.directories import FAMILIES, dense_directory, load, logits, same_state, transformers

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config


def stored(directory):
    """name -> tensor, of all files."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def quantization(directory):
    return json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_the_same_bits_again(tmp_path, family, shard):
    model = load(dense_directory(tmp_path / "dense", family), quantization_config=Nf4Config())
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size=shard)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (shard == "20KB")
    again = load(saved)
    assert same_state(again, model)
    assert torch.equal(logits(again), logits(model))

    class_name = FAMILIES[family][0]
    dense = getattr(transformers, class_name).from_pretrained(tmp_path / "dense")
    nf4.load_checkpoint(dense, saved)
    assert torch.equal(logits(dense), logits(model))


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "af4", [i / 15 * 2 - 1 for i in range(16)]], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_names_on_disk(tmp_path, codebook, double_quant):
    config = Nf4Config(codebook=codebook, double_quant=double_quant, skip=["o_proj", "layers.1.mlp"])
    model = load(dense_directory(tmp_path / "dense"), quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    name = "model.layers.0.mlp.up_proj.weight"
    state = {"nf4": "bitsandbytes__nf4", "fp4": "bitsandbytes__fp4", "af4": "nf4kernels__af4"}
    parts = ["absmax", "quant_map", f"quant_state.{state.get(str(codebook), 'nf4kernels__custom')}"]
    parts += ["nested_absmax", "nested_quant_map"] if double_quant else []
    tensors = stored(tmp_path / "saved")
    assert {n for n in tensors if n.startswith(name)} == {name, *(f"{name}.{part}" for part in parts)}
    fields = quantization(tmp_path / "saved")
    assert fields["quant_method"] == "nf4kernels"
    dense = {n.removesuffix(".weight") for n, t in tensors.items() if n.endswith("_proj.weight") and t.dim() == 2
             and t.dtype == torch.bfloat16}  # fmt: skip
    assert set(fields["modules_to_not_convert"]) == {"lm_head", *dense}
    assert len(dense) == 5
    again = load(tmp_path / "saved")
    assert same_state(again, model)
    assert again.config.quantization_config.to_dict() == fields


def test_what_was_merged_is_dense_again(tmp_path):
    model = load(dense_directory(tmp_path / "dense", "Mixtral"), quantization_config=Nf4Config())
    nf4.merge_model(model.model.layers[0])
    model.save_pretrained(tmp_path / "saved")
    assert "model.layers.0.self_attn.q_proj" in quantization(tmp_path / "saved")["modules_to_not_convert"]
    again = load(tmp_path / "saved")
    assert same_state(again, model)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Mixtral"])
@pytest.mark.parametrize("by", ["dequantize", "merge_model"])
def test_a_dense_model_again(tmp_path, family, by):
    directory = dense_directory(tmp_path / "dense", family)
    model = load(directory, quantization_config=Nf4Config())
    expected = {name: layer.dequantize(torch.bfloat16) for name, layer in tiny.layers(model).items()}
    model = model.dequantize() if by == "dequantize" else model
    nf4.merge_model(model)
    model.save_pretrained(tmp_path / "saved")
    assert quantization(tmp_path / "saved") is None
    assert not hasattr(model.config, "quantization_config")
    again = load(tmp_path / "saved")
    assert not tiny.layers(again)
    assert {n: t.shape for n, t in stored(tmp_path / "saved").items()} == {
        n: t.shape for n, t in stored(directory).items()
    }
    assert torch.equal(logits(again), logits(model))
    for name, weight in expected.items():
        came = again.get_submodule(name).weight
        assert torch.equal(came.t() if family == "GPT-2" else came, weight)


def test_a_part_of_the_model_and_one_around_it(tmp_path):
    """The base model of a saved causal language model, and the other way round."""
    model = load(dense_directory(tmp_path / "dense", "Mixtral"), quantization_config=Nf4Config())
    model.save_pretrained(tmp_path / "saved")
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    assert same_state(base, model.model)
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert same_state(again.model, model.model)


def test_offloaded_to_disk(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: nothing is offloaded")
    model = load(dense_directory(tmp_path / "dense", "Qwen3-MoE"), quantization_config=Nf4Config())
    model.save_pretrained(tmp_path / "saved")
    device_map = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"], "cpu")
    device_map |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
    offloaded = load(tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload")
    assert offloaded.model.layers[1].self_attn.q_proj.weight.is_meta
    assert offloaded.model.layers[1].mlp.experts.down_proj.weight.is_meta
    for _ in range(2):
        assert torch.equal(logits(offloaded), logits(model))
    offloaded.save_pretrained(tmp_path / "again")
    assert same_state(load(tmp_path / "again"), model)


def test_adapters_of_our_own_are_not_left_behind(tmp_path):
    model = load(dense_directory(tmp_path / "dense"), quantization_config=Nf4Config())
    tiny.layers(model)["model.layers.1.mlp.up_proj"].add_lora(nf4.LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"save_pretrained: the model must have no adapters .*'default' on model"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("merged", [False, True])
def test_the_model_inside_of_a_peft_model_is_not_saved_by_names_that_nothing_loads(tmp_path, merged):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = load(dense_directory(tmp_path / "dense"), quantization_config=Nf4Config())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    if merged:
        adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"no PEFT layers in it .*up_proj.base_layer$"):
        model.save_pretrained(tmp_path / "saved")
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved"), model)


def test_a_conv1d_is_one_again_after_peft_merged_the_whole_model(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = load(dense_directory(tmp_path / "dense", "GPT-2"), quantization_config=Nf4Config())
    targets = ["c_attn", "c_fc", "c_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    expected = logits(adapted.eval())
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(merged))
    torch.testing.assert_close(logits(again), expected, rtol=0.05, atol=0.05)


def test_another_dtype_than_the_saved_one(tmp_path):
    model = load(dense_directory(tmp_path / "dense", "Qwen3-MoE"), quantization_config=Nf4Config())
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32, torch.uint8}
    for name, layer in tiny.layers(model).items():
        assert torch.equal(again.get_submodule(name).weight, layer.weight)
        assert again.get_submodule(name).dense_dtype == torch.float32
    assert again.model.layers[0].mlp.experts.down_proj.dense_dtype == torch.float32
    dense = again.dequantize()
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    assert logits(dense).isfinite().all()
