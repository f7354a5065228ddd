"""transformers' fused experts of every layout that QuantExperts takes, small, with random weights, biases and norms."""

from importlib import import_module

import torch
from torch import nn

E, H, I = 5, 128, 64  # noqa: E741
GPT_OSS = {"hidden_size": H, "intermediate_size": I, "num_local_experts": E}
DEEPSEEK = {"hidden_size": H, "moe_intermediate_size": I, "n_routed_experts": E}
# name -> module of transformers.models, its class, the class of its configuration, options
LAYOUTS = {
    "gpt_oss": ("GptOssExperts", "GptOssConfig", GPT_OSS),  # transposed, interleaved, biases, a gate of its own
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", "OpenAIPrivacyFilterConfig", GPT_OSS),  # not interleaved
    "aria": ("AriaExperts", "AriaTextConfig", {"hidden_size": H, "intermediate_size": I, "moe_num_experts": E}),
    "nemotron_h": ("NemotronHExperts", "NemotronHConfig", DEEPSEEK),  # no gate
    "muse_spark": ("MuseSparkExperts", "MuseSparkTextConfig", {
        "moe_hidden_size": H, "moe_intermediate_size": I, "num_local_experts": E}),  # a norm after down
    "minimax_m3_vl": ("MiniMaxM3VLExperts", "MiniMaxM3VLTextConfig", GPT_OSS),  # a gate of its own, no act_fn
    "deepseek_v4": ("DeepseekV4Experts", "DeepseekV4Config", GPT_OSS),  # a gate of its own that takes act_fn
}  # fmt: skip


def experts_of(layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind, config_kind, options = LAYOUTS[layout]
    modeling = import_module(f"transformers.models.{layout}.modeling_{layout}")
    configuration = import_module(f"transformers.models.{layout}.configuration_{layout}")
    config = getattr(configuration, config_kind)(**options)
    config._experts_implementation = "eager"
    module = getattr(modeling, kind)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=H**-0.5, generator=generator)
    return module.to(dtype)
