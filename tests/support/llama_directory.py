"""A tiny Llama in a Hugging Face directory, and `nf4kernels quantize` on it."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nf4kernels.cli import main

transformers = pytest.importorskip("transformers", reason="transformers is not installed: no directory is quantized")


LAYER_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_llama(directory: Path, shard_size="5GB", dtype=torch.bfloat16, **changes):
    options = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**options, **changes})).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    (directory / "pytorch_model.bin").write_bytes(b"another format")
    (directory / ".cache").mkdir()
    (directory / ".cache" / "hidden").write_text("", encoding="utf-8")
    (directory / "templates").mkdir()
    (directory / "templates" / "chat.jinja").write_text("text", encoding="utf-8")
    return model


def command(*args):
    return main(["quantize", *map(str, args)])


def tree(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def all_tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_only_input(tmp_path):
    assert os.listdir(tmp_path) == ["in"], "something was left behind"
