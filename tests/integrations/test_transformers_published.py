"""`from_pretrained` on directories that others publish in 4 bits, and GGUF files that become such of ours."""

import json

import pytest
import torch
from support import directories, published, tiny

import nf4kernels as nf4
from nf4kernels.cli import main

integration = pytest.importorskip("nf4kernels.integrations.transformers", reason="transformers is not installed")
transformers = tiny.transformers()
CASES = [("Llama", "gptq_act_order"), ("Llama", "modelopt"), ("Qwen3-MoE", "compressed_nvfp4"), ("gpt-oss", "gpt_oss")]


def make(family):
    class_name, usual = directories.FAMILIES[family]
    return tiny.make(class_name, dtype=torch.bfloat16, **usual)


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in ours
    )


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_it_is_loaded_losslessly_saved_and_loaded_again(tmp_path, family, layout):
    twin = published.publish(tmp_path / "published", make(family), layout)
    config = integration.Nf4Config(compute_dtype=torch.bfloat16)
    model = directories.load(tmp_path / "published", quantization_config=config)
    assert config.codebook == "nf4"  # the caller's stays as it is
    torch.testing.assert_close(directories.logits(model), directories.logits(twin), atol=6e-3, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    again = directories.load(tmp_path / "saved")
    assert same(again.state_dict(), model.state_dict())
    if family != "gpt-oss":  # whose mask makes no difference at this length
        assert torch.equal(again.generate(tiny.IDS, max_new_tokens=4), model.generate(tiny.IDS, max_new_tokens=4))
    merged = model.dequantize(torch.bfloat16)
    assert directories.same_state(merged, twin)


def test_experts_that_are_there_already_are_filled(tmp_path):
    """From what is published, converted or saved, each of which brings a checksum of the bytes or zeros for it."""
    published.publish(tmp_path / "published", make("gpt-oss"), "gpt_oss")
    model = directories.load(tmp_path / "published", quantization_config=integration.Nf4Config())
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "converted")]) == 0
    model.save_pretrained(tmp_path / "saved")
    for name in ("published", "converted", "saved"):
        other = make("gpt-oss")
        nf4.quantize_model(other, progress=False, codebook="mxfp4", skip=["self_attn"])
        nf4.load_checkpoint(other, tmp_path / name)
        assert same(other.state_dict(), model.state_dict())


def test_a_published_format_beside_nf4(tmp_path):
    """Attention, which gpt-oss publishes in 16 bits, in NF4; and NF4 beside experts that became MXFP4 later."""
    published.publish(tmp_path / "published", make("gpt-oss"), "gpt_oss")
    first = directories.load(tmp_path / "published", quantization_config=integration.Nf4Config())
    nf4.quantize_model(first, progress=False)
    make("gpt-oss").save_pretrained(tmp_path / "dense")
    second = directories.load(tmp_path / "dense", quantization_config=integration.Nf4Config(skip=["experts"]))
    nf4.quantize_model(second, progress=False, codebook="mxfp4")
    for number, model in enumerate((first, second)):
        assert {each.codebook for each in model.modules() if hasattr(each, "codebook")} >= {"nf4", "mxfp4"}
        model.save_pretrained(tmp_path / f"saved{number}")
        again = directories.load(tmp_path / f"saved{number}")
        assert same(again.state_dict(), model.state_dict())


def test_fewer_layers_than_the_checkpoint_has(tmp_path):
    """transformers leaves out what the model lacks, experts as well."""
    published.publish(tmp_path / "published", make("gpt-oss"), "gpt_oss")
    model = directories.load(tmp_path / "published", quantization_config=integration.Nf4Config())
    model.save_pretrained(tmp_path / "saved")
    for name in ("published", "saved"):
        options = {"quantization_config": integration.Nf4Config(), "num_hidden_layers": 1}
        short = tiny.transformers().AutoModelForCausalLM.from_pretrained(tmp_path / name, **options)
        assert len(short.model.layers) == 1
        ours, theirs = short.state_dict(), model.state_dict()
        assert same(ours, {key: theirs[key] for key in ours})


def test_who_does_not_ask_gets_what_transformers_has(tmp_path):
    """Its own quantizer, or its own word for a method that it does not know."""
    published.publish(tmp_path, make("gpt-oss"), "gpt_oss")
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    options = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert not any(isinstance(module, nf4.QuantExperts) for module in model.modules())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    quantizer, *_ = transformers.quantizers.auto.get_hf_quantizer(config, None, None, True, {})
    assert isinstance(quantizer, Mxfp4HfQuantizer)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    stored["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ImportError, match="optimum"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_it_trains_with_pefts_adapters(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    published.publish(tmp_path, make("Llama"), "gptq_act_order")
    model = directories.load(tmp_path, quantization_config=integration.Nf4Config())
    dense = {name: layer.dequantize(torch.float32) for name, layer in tiny.layers(model).items()}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    tiny.fill_adapters(model)
    model(tiny.IDS, labels=tiny.IDS).loss.backward()
    name = "model.layers.0.self_attn.q_proj"
    adapted = model.base_model.model.get_submodule(name)
    A, B = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    assert A.grad.norm() > 0
    expected = dense[name] + adapted.scaling["default"] * (B @ A).detach().float()
    merged = model.merge_and_unload().get_submodule(name)
    torch.testing.assert_close(merged.weight.float(), expected.bfloat16().float(), atol=2e-3, rtol=1e-2)


def test_what_is_published_is_not_offloaded_to_disk(tmp_path):
    published.publish(tmp_path / "published", make("Llama"), "gptq")
    with pytest.raises(
        ValueError, match=r"device_map must not offload to disk what others publish .*nf4kernels convert"
    ):
        directories.load(
            tmp_path / "published", quantization_config=integration.Nf4Config(),
            device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path,
        )  # fmt: skip


GGUF = {
    "llama": ("LlamaForCausalLM", {}, "Q4_0", "Q8_0"),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, "IQ4_NL", "F32"),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16}, "Q4_0", "F32"),
}


@pytest.mark.parametrize("architecture", GGUF)
def test_a_gguf_file_is_loaded_and_converted(tmp_path, capsys, architecture):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from support import gguf_files

    class_name, changes, kind, others = GGUF[architecture]
    changes = {"config_name": "Gemma3TextConfig", **changes} if architecture == "gemma3" else changes
    model = tiny.make(class_name, **changes)
    numbers = gguf_files.write(tmp_path / "model.gguf", model, architecture, kind, others)
    twin = tiny.make(class_name, **changes)
    twin.load_state_dict(numbers)
    nf4.load_checkpoint(model, tmp_path / "model.gguf")
    layers = tiny.layers(model)
    assert len(layers) == 14
    assert {layer.codebook for layer in layers.values()} == {kind.lower()}
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(torch.float32), numbers[f"{name}.weight"])
    torch.testing.assert_close(directories.logits(model), directories.logits(twin), atol=1e-5, rtol=1e-5)
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "ours")]) == 0
    assert f"14 weights in {kind.lower()}, none of them changed" in capsys.readouterr().out
    again = directories.load(tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(again.model.embed_tokens.weight, numbers["model.embed_tokens.weight"])
    for name, layer in tiny.layers(again).items():
        assert torch.equal(layer.dequantize(torch.float32), numbers[f"{name}.weight"])


def test_gguf_in_other_types_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from support import gguf_files

    model = tiny.llama()
    gguf_files.write(tmp_path / "q4_1.gguf", model, "llama", "Q4_1")
    with pytest.raises(ValueError, match=r"is in Q4_1, blocks with a minimum \(asymmetric\), .*to NF4 instead"):
        nf4.load_checkpoint(model, tmp_path / "q4_1.gguf")
    gguf_files.write(tmp_path / "q5_0.gguf", model, "llama", "Q5_0")
    with pytest.raises(ValueError, match=r"must be in one of F32, .*, got Q5_0"):
        nf4.load_checkpoint(model, tmp_path / "q5_0.gguf")
    gguf_files.write(tmp_path / "bert.gguf", model, "bert")
    with pytest.raises(ValueError, match=r"general\.architecture must be one of llama, .*, got 'bert'"):
        nf4.load_checkpoint(model, tmp_path / "bert.gguf")
    gguf_files.write(tmp_path / "whole.gguf", model, "llama")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for cut, sentence in ((len(whole) - 100, "ends inside of"), (200, "must be a whole GGUF file"), (2, "GGUF")):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=sentence):
            nf4.load_checkpoint(model, tmp_path / "cut.gguf")
    assert not tiny.layers(model)
