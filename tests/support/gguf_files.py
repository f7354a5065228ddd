"""GGUF files of tiny models, written by the `gguf` package as llama.cpp's converter would, and what they decode to."""

import numpy as np
import pytest
import torch
from support.published import is_linear

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def iq4_nl(weight):
    """Rows of bytes in IQ4_NL, which the package decodes and does not write: the nearest level of each weight."""
    blocks = weight.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    wide = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.abs(blocks[..., None] / wide[..., None] - LEVELS).argmin(-1).astype(np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([scale.view(np.uint8), packed], 1).reshape(weight.shape[0], -1)


def rows_of(weight, kind):
    return iq4_nl(weight) if kind == "IQ4_NL" else gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


def decoded(rows, kind):
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]))


OF_GEMMA = {
    "pre_feedforward_layernorm": "ffn_norm", "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def paired(weight, heads):
    """q's or k's rows as llama.cpp writes them: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, architecture, kind="Q4_0", others="F32", linear=is_linear):
    """The model's tensors, those of `linear` names in `kind`, other matrices in `others`; the state it decodes to."""
    config, state = model.config, {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    rope = config.rope_parameters
    theta = rope.get("rope_theta") or rope["full_attention"].get("rope_theta", 1e6)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    numbers = {}
    for name, weight in state.items():
        base, _, leaf = name.rpartition(".")
        parts = base.split(".")
        block, stem = (f"blk.{parts[2]}.", ".".join(parts[3:])) if parts[:2] == ["model", "layers"] else ("", base)
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        is_paired = architecture == "llama" and stem in heads
        names = NAMES | OF_GEMMA if architecture.startswith("gemma") else NAMES
        ours = f"{block}{names[stem]}.{leaf}"
        of_file = paired(weight, heads[stem]) if is_paired else weight
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            of_file = weight + 1
        numbers[name] = torch.from_numpy(weight)
        its = kind if linear(name, numbers[name]) else others if weight.ndim == 2 else "F32"
        if its == "F32":
            writer.add_tensor(ours, np.ascontiguousarray(of_file))
            continue
        rows = rows_of(np.ascontiguousarray(of_file), its)
        writer.add_tensor(ours, rows, raw_dtype=gguf.GGMLQuantizationType[its])
        numbers[name] = decoded(rows_of(weight, its), its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers
