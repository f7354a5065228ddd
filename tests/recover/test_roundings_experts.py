"""Roundings of a mixture of fused experts: attention is calibrated, experts are rounded to the nearest level."""

import pytest
import torch

import nf4kernels as nf4
from nf4kernels.recover.roundings import Awq, Gptq

transformers = pytest.importorskip("transformers", reason="transformers is not installed: no mixture is made")


def mixture():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, num_experts_per_tok=2, intermediate_size=64, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def test_experts_are_plain_and_a_norm_that_the_router_reads_is_not_folded():
    batches = [{"input_ids": torch.randint(0, 64, (4, 20), generator=torch.Generator().manual_seed(1))}]
    plain, model = mixture(), mixture()
    nf4.quantize_model(plain, progress=False)
    rounding = Awq(batches, Gptq())
    nf4.quantize_model(model, progress=False, rounding=rounding)
    for ours, expected in zip(model.model.layers, plain.model.layers):
        for part in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(ours.mlp.experts, part).weight, getattr(expected.mlp.experts, part).weight)
        assert not torch.equal(ours.self_attn.q_proj.weight, expected.self_attn.q_proj.weight)
    assert all("post_attention_layernorm" not in fold[0] for fold in rounding.folded)
