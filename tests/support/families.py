"""A tiny random model of each family that people fine-tune, with a batch for it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: there are no families")

VOCABULARY, LENGTH, PATCHES = 96, 7, 4
IMAGE_TOKEN = 90
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
DECODER = {**TOKENS, **BODY, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
TOWER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def text(first: int = 3, rows: int = 2) -> dict[str, Tensor]:
    """No token twice in a row, no padding, no special token."""
    return {"input_ids": torch.arange(first, first + rows * LENGTH).view(rows, LENGTH)}


def signal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def encoder_decoder() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": text(30)["input_ids"][:, :5]}


def speech() -> dict[str, Tensor]:
    return {"input_features": signal(2, 16, 20), "decoder_input_ids": text(30)["input_ids"][:, :5]}


def image_and_text(tokens: int = PATCHES) -> dict[str, Tensor]:
    ids = text()["input_ids"]
    ids = torch.cat([ids[:, :1], torch.full((2, tokens), IMAGE_TOKEN), ids[:, 1:]], 1)
    return {"input_ids": ids, "pixel_values": signal(2, 3, 16, 16)}


def marked_image_and_text() -> dict[str, Tensor]:
    """As PaliGemma and Gemma 3 want it in training: they attend to images in both directions."""
    batch = image_and_text()
    return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}


def tiles_and_text() -> dict[str, Tensor]:
    """SmolVLM's: several images for each text, and a token for four patches."""
    batch = image_and_text(PATCHES // 4)
    return {**batch, "pixel_values": batch["pixel_values"][:, None]}


def patches_and_text() -> dict[str, Tensor]:
    """Qwen2.5-VL's: patches in one row for all images, of two frames each, and a token for four patches."""
    batch = image_and_text(PATCHES // 4)
    patches, grid = signal(2 * PATCHES, 3 * 2 * 8 * 8), torch.tensor([[1, 2, 2]] * 2)
    kinds = (batch["input_ids"] == IMAGE_TOKEN).int()
    return {**batch, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


@dataclass(frozen=True)
class Family:
    """A model class of transformers, with a configuration that is tiny.

    Attributes:
        options: of the configuration, a dict in it being a configuration of its own.
        dense: ends of the names of the layers and experts that stay dense.
        targets: PEFT's target_modules.
        converted: whether the loader changes experts that have the model's names, which from 5.24 on can be prevented.
        generates: whether the model can; static_cache: with such a one, in every version of transformers.
    """

    class_name: str
    options: dict = field(default_factory=dict)
    batch: Callable[[], dict[str, Tensor]] = text
    dense: tuple[str, ...] = ("lm_head",)
    targets: str | tuple[str, ...] = "all-linear"
    converted: bool = False
    generates: bool = True
    static_cache: bool = True

    def config(self):
        config_class = getattr(transformers, self.class_name).config_class
        return config_class(**self.options)

    def model(self) -> nn.Module:
        """Evaluating, with matrices whose outputs are as large as their inputs, so that every layer matters."""
        if not hasattr(transformers, self.class_name):
            pytest.skip(f"this transformers has no {self.class_name}")
        torch.manual_seed(0)
        model = getattr(transformers, self.class_name)(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    fan_in = parameter.shape[-1] if parameter.dim() < 4 else parameter[0].numel()
                    parameter.normal_(std=fan_in**-0.5)
        return model.eval()


# Where PEFT takes "all-linear" for the experts too.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

FAMILIES = {
    "llama": Family("LlamaForCausalLM", DECODER),
    "qwen2": Family("Qwen2ForCausalLM", DECODER),
    "qwen3": Family("Qwen3ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "gemma2": Family("Gemma2ForCausalLM", {**DECODER, "num_hidden_layers": 2, "sliding_window": 4}),
    "gemma3": Family("Gemma3ForCausalLM", {**DECODER, "num_hidden_layers": 2, "sliding_window": 4,
                                           "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": Family("Phi3ForCausalLM", DECODER),
    "gpt2": Family("GPT2LMHeadModel", {**TOKENS, "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 64}),
    "gpt_neox": Family("GPTNeoXForCausalLM", {**TOKENS, **BODY}, dense=("lm_head", "embed_out")),
    "mixtral": Family("MixtralForCausalLM", {
        **DECODER, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}, targets=ATTENTION),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {
        **DECODER, **EXPERTS, "num_experts": 4, "norm_topk_prob": True}, targets=ATTENTION),
    "granite_moe": Family("GraniteMoeForCausalLM", {
        **TOKENS, **BODY, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        dense=("router.layer", "lm_head"), targets=ATTENTION),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", {
        **TOKENS, **BODY, **EXPERTS, "num_hidden_layers": 2, "num_key_value_heads": 4, "n_routed_experts": 4,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
        targets=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    "gpt_oss": Family("GptOssForCausalLM", {
        **DECODER, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}, targets=ATTENTION),
    "t5": Family("T5ForConditionalGeneration", {
        **TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}, encoder_decoder,
        dense=("wo", "lm_head")),
    "bert": Family("BertForMaskedLM", {**TOKENS, **BODY}, dense=("transform.dense", "decoder"), generates=False,
                   static_cache=False),
    "bert_classifier": Family("BertForSequenceClassification", {**TOKENS, **BODY, "num_labels": 3},
                              dense=("classifier",), generates=False, static_cache=False),
    "llava": Family("LlavaForConditionalGeneration", {
        "text_config": {"model_type": "llama", **DECODER}, "image_token_index": IMAGE_TOKEN,
        "vision_config": {"model_type": "clip_vision_model", **TOWER}, "vision_feature_layer": -1}, image_and_text),
    "paligemma": Family("PaliGemmaForConditionalGeneration", {
        "text_config": {"model_type": "gemma", **DECODER}, "image_token_index": IMAGE_TOKEN, "projection_dim": 64,
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}},
        marked_image_and_text),
    "gemma3_vision": Family("Gemma3ForConditionalGeneration", {
        "text_config": {**DECODER, "sliding_window": 4}, "image_token_index": IMAGE_TOKEN, "mm_tokens_per_image": 4,
        "vision_config": {**TOWER, "vision_use_head": False}}, marked_image_and_text),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", {
        "text_config": {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "image_token_id": IMAGE_TOKEN, "vision_start_token_id": 89, "vision_config": {
            "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 8,
            "out_hidden_size": 64, "fullatt_block_indexes": [0], "window_size": 16}}, patches_and_text),
    # Its files may have the experts transposed.
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration", {
        "text_config": {**DECODER, **EXPERTS, "num_experts": 4,
                        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "image_token_id": IMAGE_TOKEN, "vision_start_token_id": 89, "vision_config": {
            "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 8,
            "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
        patches_and_text, dense=("mlp.gate", "lm_head"), targets=ATTENTION, converted=True),
    "smolvlm": Family("SmolVLMForConditionalGeneration", {
        "text_config": {"model_type": "llama", **DECODER}, "image_token_id": IMAGE_TOKEN, "scale_factor": 2,
        "pad_token_id": 0, "vision_config": TOWER}, tiles_and_text),
    "whisper": Family("WhisperForConditionalGeneration", {
        **TOKENS, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16,
        "max_source_positions": 10, "max_target_positions": 32, "decoder_start_token_id": 1}, speech,
        dense=("proj_out",)),
    # The other three are read by the forward, which does not call them, and PEFT refuses adapters there.
    "mamba": Family("MambaForCausalLM", {**TOKENS, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8},
                    dense=("x_proj", "dt_proj", "out_proj", "lm_head"), targets=("in_proj",)),
    "mamba2": Family("Mamba2ForCausalLM", {
        **TOKENS, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 16, "num_heads": 4, "head_dim": 32,
        "n_groups": 1, "chunk_size": 8}, dense=("out_proj", "lm_head"), targets=("in_proj",)),
    "jamba": Family("JambaForCausalLM", {
        **TOKENS, **BODY, "intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "use_mamba_kernels": False}, dense=("dt_proj", "router", "lm_head"),
        targets=("in_proj", "x_proj", "out_proj", *ATTENTION), static_cache=False),
}  # fmt: skip
