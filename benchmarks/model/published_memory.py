"""What LoRA on published 4-bit models holds, by counting: weights, adapters, gradients, optimizer.

    python -m benchmarks.model.published_memory [--rank 16]

Each model is built on the meta device from the sizes of its published config.json. Its parameters are counted: those
that are published in 4 bits, with their scales, and the rest in 16 bits; adapters of the rank on attention and on every
expert, their gradients and AdamW's two moments, all in the dtype of the adapters. Activations come on top: with
checkpointing, one hidden state a layer and token, and the largest layer's own once.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

GIB = 2**30


@dataclass(frozen=True)
class Published:
    """A model as it is published.

    Attributes:
        config: its configuration, with the published sizes.
        format: of its 4-bit weights, and bits a weight with the scales.
        in_4_bits: what of it is published in 4 bits, by the names of parameters.
        adapted: what else than fused experts gets adapters, by the names of parameters.
    """

    config: transformers.PretrainedConfig
    format: str
    bits: float
    in_4_bits: str
    adapted: str = r"self_attn\.\w+_proj\w*\.weight$"


def published() -> dict[str, Published]:
    """Name -> model, by the config.json of gpt-oss-20b and -120b, Qwen3-30B-A3B and Kimi-K2-Thinking."""
    gpt_oss = {
        "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 201088,
    }  # fmt: skip
    mxfp4 = ("MXFP4", 4 + 8 / 32, r"experts\.(gate_up|down)_proj$")
    qwen = {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936,
    }  # fmt: skip
    kimi = {
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 1, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 1, "topk_group": 1,
        "vocab_size": 163840,
    }  # fmt: skip
    linear = r"(experts\.(gate_up|down)_proj|self_attn\.\w+_proj\.weight)$"
    return {
        "gpt-oss-20b": Published(
            transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32, **gpt_oss), *mxfp4
        ),
        "gpt-oss-120b": Published(
            transformers.GptOssConfig(num_hidden_layers=36, num_local_experts=128, **gpt_oss), *mxfp4
        ),
        "Qwen3-30B-A3B": Published(transformers.Qwen3MoeConfig(**qwen), "NVFP4", 4 + 8 / 16, linear),
        "Kimi K2": Published(
            transformers.DeepseekV3Config(**kimi), "INT4, group 32", 4 + 16 / 32, r"\.experts\.(gate_up|down)_proj$"
        ),
    }


def meta_model(config: transformers.PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def adapter_sizes(model: nn.Module, adapted: str, rank: int) -> Iterator[int]:
    """The elements of each adapter; a weight `[.., N, K]` or `[.., K, N]` gets rank * (N + K) for each matrix in it."""
    for name, weight in model.named_parameters():
        is_experts = weight.dim() == 3 and "experts" in name
        if is_experts or re.search(adapted, name):
            matrices = weight.shape[0] if is_experts else 1
            yield matrices * rank * (weight.shape[-1] + weight.shape[-2])


def bytes_of(entry: Published, rank: int) -> dict[str, float]:
    """What -> bytes, each line of the sum."""
    model = meta_model(entry.config)
    in_4_bits = sum(p.numel() for name, p in model.named_parameters() if re.search(entry.in_4_bits, name))
    dense = sum(p.numel() for p in model.parameters()) - in_4_bits
    adapters = sum(adapter_sizes(model, entry.adapted, rank))
    return {
        "4-bit weights": in_4_bits * entry.bits / 8,
        "the rest in 16 bits": dense * 2,
        "adapters": adapters * 2,
        "their gradients and moments": adapters * (2 + 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model.published_memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (default 16)")
    rank = parser.parse_args().rank
    header: list[str] = []
    for name, entry in published().items():
        parts = bytes_of(entry, rank)
        if not header:
            header = ["model", "format", *parts, "together", "all in 16 bits"]
            print(f"GiB, LoRA of rank {rank} on attention and every expert, in bf16\n")
            print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
        whole = parts["4-bit weights"] * 16 / entry.bits + sum(parts.values()) - parts["4-bit weights"]
        cells = [f"{value / GIB:.1f}" for value in (*parts.values(), sum(parts.values()), whole)]
        print(f"| {name} | {entry.format} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
