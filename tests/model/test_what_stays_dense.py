"""Heads and other trainable parts stay dense, by rule; skip adds; what finds nothing is an error."""

import pytest
import torch
from support import tiny
from support.fused_experts import fused
from support.unchanged import assert_unchanged, snapshot
from torch import nn

import nf4kernels as nf4


def quantized_names(model, **options):
    return {layer.name for layer in nf4.quantize_model(model, progress=False, **options).layers}


HEADS = [
    # class, changes, the head
    ("LlamaForSequenceClassification", {"num_labels": 3}, "score"),
    ("GPT2ForSequenceClassification", {"n_embd": 64, "n_head": 4, "n_layer": 1, "num_labels": 3}, "score"),
    ("BertForSequenceClassification", {"num_labels": 3}, "classifier"),
    ("DebertaV2ForTokenClassification", {"num_labels": 3}, "classifier"),
    ("RobertaForSequenceClassification", {"num_labels": 3}, "classifier.out_proj"),
    ("BertForQuestionAnswering", {}, "qa_outputs"),
    ("LlamaForQuestionAnswering", {}, "qa_outputs"),
    ("BertForMultipleChoice", {}, "classifier"),
    ("BertForMaskedLM", {}, "cls.predictions.decoder"),
    ("RobertaForMaskedLM", {}, "lm_head.decoder"),
    ("LlamaForCausalLM", {}, "lm_head"),
    ("Wav2Vec2ForCTC", {"conv_dim": (32,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1,
                        "num_conv_pos_embedding_groups": 4}, "lm_head"),
    ("ViTForImageClassification", {"image_size": 16, "patch_size": 8, "num_labels": 3}, "classifier"),
    ("ModernBertForSequenceClassification", {"num_labels": 3}, "classifier"),
    ("RwkvForCausalLM", {"attention_hidden_size": 64}, "head"),
    ("T5ForQuestionAnswering", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_decoder_layers": 1,
                                "num_heads": 4}, "qa_outputs"),
]  # fmt: skip


@pytest.mark.parametrize(("class_name", "changes", "head"), HEADS, ids=lambda v: v if isinstance(v, str) else "")
def test_the_head_of_a_task_stays_dense(class_name, changes, head):
    """Report's kind: a new classification head frozen in 4 bits, accuracy at chance."""
    if not hasattr(tiny.transformers(), class_name):
        pytest.skip(f"this transformers has no {class_name}")
    model = tiny.make(class_name, **changes)
    assert isinstance(model.get_submodule(head), nn.Linear)
    quantized = quantized_names(model)
    assert head not in quantized
    assert quantized or class_name.startswith("GPT2"), "the body must be in 4 bits"


def test_a_head_of_any_name_stays_dense():
    """Report's kind: an untied output layer with a name that no list has; get_output_embeddings() knows it."""
    model = tiny.llama()
    model.vocabulary_out = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.vocabulary_out
    assert "vocabulary_out" not in quantized_names(model)


def test_copies_that_peft_trains_stay_dense():
    """Report's kind: modules_to_save frozen in 4 bits inside a PeftModel."""
    peft = pytest.importorskip("peft")
    model = tiny.make("LlamaForSequenceClassification", num_labels=3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score", "gate_proj"])
    model = peft.get_peft_model(model, config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    nf4.quantize_model(model, progress=False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_skip_adds_to_the_defaults():
    """Report's kind: skip=["k_proj"] put lm_head in 4 bits."""
    quantized = quantized_names(tiny.llama(), skip=["k_proj"])
    assert "lm_head" not in quantized
    assert not any("k_proj" in name for name in quantized)
    assert any("q_proj" in name for name in quantized)


def test_a_pattern_that_matches_nothing_is_an_error():
    """Report's kind: a misspelt name, and nothing is skipped."""
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"skip must match.*q_porj"):
        nf4.quantize_model(model, skip=["q_porj"], progress=False)
    assert not tiny.layers(model)


def test_a_pattern_that_matches_what_is_dense_anyway_is_no_error():
    """The command line accepts a pattern for an embedding; so does the API, and for a layer in 4 bits already."""
    model = tiny.llama()
    nf4.quantize_model(model, skip=["embed_tokens"], progress=False)
    nf4.quantize_model(model, skip=["q_proj"], progress=False)


def test_adapters_asked_for_and_no_layer_replaced_is_an_error():
    """Report's kind: "trainable parameters: 0": every layer was left alone and lora= was dropped in silence."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.Embedding(4, 64))
    with pytest.raises(ValueError, match=r"(?s)lora.*parametrized.*embedding"):
        nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), progress=False)


def test_adapters_asked_for_on_a_model_in_4_bits_already_is_an_error():
    """Report's kind: a second quantize_model(lora=) adds no adapter and says nothing."""
    model = tiny.quantized_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lora must have a layer to go on, got .*already a QuantLinear"):
        nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), progress=False)
    assert_unchanged(model, before)


def test_adapters_asked_for_on_experts_alone_are_there():
    model = nn.ModuleDict({"experts": fused(), "table": nn.Embedding(4, 64)})
    report = nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), progress=False)
    assert [layer.kind for layer in report.layers] == ["gate_up_proj", "down_proj"]
    assert all(part.adapter_names == ["default"] for part in (model.experts.gate_up_proj, model.experts.down_proj))


def test_api_and_command_line_have_one_list():
    """Report's kind: the same model by the two ways has other dense layers."""
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in
                           ("body", "lm_head", "embed_out", "router", "score", "classifier")})  # fmt: skip
    assert quantized_names(model) == {"body"}


def test_a_plain_model_without_a_head_keeps_none_dense():
    """Kept right: no rule about heads reaches an nn.Sequential."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    assert quantized_names(model) == {"0", "2"}


def test_the_parts_that_are_models_of_their_own_are_no_heads():
    """Kept right: a composite keeps its towers beside the base, and they are bodies."""

    class Tower(nn.Module):
        base_model_prefix = "tower"

        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(64, 64)

    class Composite(nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.model, self.tower, self.answers = Tower(), Tower(), nn.Linear(64, 3)

    outer = nn.ModuleDict({"inner": Composite()})  # a model in a wrapper of a user's own
    report = nf4.quantize_model(outer, progress=False)
    assert {layer.name for layer in report.layers} == {"inner.model.proj", "inner.tower.proj"}
    assert {entry.name: entry.reason for entry in report.skipped} == {"inner.answers": "a head of Composite"}


def test_the_trained_head_learns():
    """What it is for: one step of a classifier moves its head."""
    model = tiny.make("LlamaForSequenceClassification", num_labels=3)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), progress=False)
    model(tiny.IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert model.score.weight.grad is not None


def test_what_a_class_keeps_in_fp32():
    """By the lists of transformers' classes, whose entries are ends, beginnings or patterns of names."""
    model = tiny.Net()
    model._keep_in_fp32_modules = ["blocks.0.0"]
    model._keep_in_fp32_modules_strict = ["1.2.weight"]
    report = nf4.quantize_model(model, progress=False)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert {layer.name for layer in report.layers} == {"blocks.0.2", "blocks.1.0"}
    assert reasons["blocks.0.0"] == reasons["blocks.1.2"] == "kept in float32 by Net"
