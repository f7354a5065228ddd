"""A small Llama with random weights and a real tokenizer, trained here, in a Hugging Face directory."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: no model directory is made")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: no tokenizer is trained")

VOCABULARY = 384  # the 256 bytes, the special tokens and a hundred merges
SPECIAL = ("<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # with the marks by which TRL tells the answers' tokens
COLORS = ("red", "green", "blue", "yellow", "black", "white", "grey", "brown")
THINGS = ("apple", "grass", "sky", "sun", "night", "snow", "rain", "earth")


def facts(count: int = 32) -> list[tuple[str, str]]:
    """`count` different questions with their answers, short and easy to learn."""
    asked = [(thing, COLORS[(turn + i) % 8]) for turn in range(8) for i, thing in enumerate(THINGS)][:count]
    return [(f"{i}. What colour is the {thing}?", f"The {thing} is {color}.") for i, (thing, color) in enumerate(asked)]


def chat_tokenizer(template: str | None = CHAT_TEMPLATE):
    """A byte-level BPE tokenizer trained on `facts`, with BOS, EOS, a pad token and a chat template, or none."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([f"system\nuser\n{q}\nassistant\n{a}" for q, a in facts(64)], trainer)
    begin, end, _, im_end, pad = SPECIAL
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=begin, eos_token=im_end if template else end, pad_token=pad,
        model_max_length=256,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def chat_model(
    directory: Path, template: str | None = CHAT_TEMPLATE, dtype=torch.float32, seed: int = 0, kind="Llama", **changes
):
    """Write the model and its tokenizer to `directory`, and return it; `changes` are fields of its configuration."""
    tokenizer = chat_tokenizer(template)
    options = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**options, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
