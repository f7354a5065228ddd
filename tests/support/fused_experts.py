"""transformers' fused experts, small, and what they compute from the weights that QuantExperts holds."""

import torch
import torch._dynamo.testing
from torch.nn.functional import silu
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

E, H, I = 5, 128, 192  # noqa: E741
PARTS = ("gate_up_proj", "down_proj")


def fused(kind=MixtralExperts, dtype=torch.float32):
    """A module of transformers with fused experts, Gaussian weights."""
    configs = {
        MixtralExperts: MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E),
        Qwen3MoeExperts: Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E),
        OlmoeExperts: OlmoeConfig(hidden_size=H, intermediate_size=I, num_experts=E),
        DeepseekV3Experts: DeepseekV3Config(hidden_size=H, moe_intermediate_size=I, n_routed_experts=E),
    }
    config = configs[kind]
    config._experts_implementation = "eager"
    module = kind(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[2] ** -0.5)
    return module.to(dtype)


def routed(tokens, k=2, dtype=torch.float32, seed=0):
    """(hidden_states, top_k_index, top_k_weights), no expert twice for a token."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, E, generator=generator).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator)
    return torch.randn(tokens, H, generator=generator).to(dtype), index, weights.to(dtype)


def exact(experts, x, index, weights):
    """(y, magnitude): in fp64 from Ŵ, and with every term by absolute value, which a rounding error scales with."""
    gate_up, down = (getattr(experts, name).dequantize(torch.float32).double() for name in PARTS)
    x, weights = x.double(), weights.double()
    y, magnitude = torch.zeros_like(x), torch.zeros_like(x)
    for slot in range(index.shape[1]):
        W, V, w = gate_up[index[:, slot]], down[index[:, slot]], weights[:, slot, None]
        gate, up = torch.einsum("th,tnh->tn", x, W).chunk(2, -1)
        y = y + w * torch.einsum("ti,thi->th", silu(gate) * up, V)
        gate, up = torch.einsum("th,tnh->tn", x.abs(), W.abs()).chunk(2, -1)
        magnitude = magnitude + w.abs() * torch.einsum("ti,thi->th", gate * up, V.abs())
    return y, magnitude


def assert_close(actual, expected, magnitude, dtype, what):
    """At most fourteen roundings to the dtype on the way (of both weights and their scales, gate, up, silu, their
    product, y, its weighting, the result), silu's slope of 1.1 among them; fp32 sums of 128 and 192 terms besides."""
    allowed = (14 * torch.finfo(dtype).eps / 2 * 1.1 + (H + I) * 2.0**-24) * magnitude
    excess = (actual.double() - expected).abs() - allowed
    assert (excess <= 0).all(), f"{what}: off by up to {excess.max():.3g} more than allowed"


X, INDEX, WEIGHTS = routed(6)


def without_attribute(name):
    module = fused()
    delattr(module, name)
    return module
