"""Tiny models of transformers in directories of their own, dense and in 4 bits, and how tests look at them."""

import pytest
import torch
from support import tiny

transformers = tiny.transformers()
FAMILIES = {
    "Llama": ("LlamaForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 64, "n_head": 4, "n_layer": 2, "tie_word_embeddings": True}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    ),
    "gpt-oss": ("GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
}


def dense_directory(directory, family="Llama", dtype=torch.bfloat16, **changes):
    """A model of that family with random weights, saved; the directory."""
    class_name, usual = FAMILIES[family]
    tiny.make(class_name, dtype=dtype, **{**usual, **changes}).save_pretrained(directory)
    return directory


def load(directory, **options):
    """A causal language model; whatever the checkpoint and the model do not share is an error."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def saved_by_bitsandbytes(dense, directory, quant_type="nf4", shard_size="5GB", **options):
    """A directory that transformers saved with bitsandbytes; name of a layer -> what bitsandbytes decodes there."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: it saves no directory")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.bfloat16, **options
    )
    model = load(dense, quantization_config=config)
    model.save_pretrained(directory, max_shard_size=shard_size)
    layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    return {name: bnb.functional.dequantize_4bit(w.data, w.quant_state) for name, w in layers.items()}


def logits(model):
    with torch.no_grad():
        return model(tiny.IDS).logits


def same_state(model, other) -> bool:
    """Bit for bit, by the same names."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
