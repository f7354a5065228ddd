"""The model for machines without a network: a small Llama over bytes, trained here on the demonstration's own text."""

from pathlib import Path

import torch

from ..model.training import training_dtype
from .data import Batch, Example
from .training import train

SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
STEPS, ROWS, LENGTH = 300, 16, 128  # 75 s on two cores, to 2.0 nats a byte


def make(directory: Path, examples: list[Example], steps: int, seed: int) -> list[float]:
    """Train on the answers of `examples` as running text, save model and tokenizer; the loss of every step.

    Prompts are left out: how a prompt leads to an answer is what the fine-tuning has to teach.
    """
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = ByT5Tokenizer(extra_ids=0)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **SHAPE,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    text = "".join(example.answer.strip().capitalize() + "\n" for example in examples)
    batches = running_text(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]), steps)
    # without its cache, which would keep the first step's bf16 copies of the weights for all steps
    is_fast = training_dtype("cpu") == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=is_fast, cache_enabled=False):
        losses, _ = train(model, batches, 3e-3, "train the byte model", weight_decay=0.1)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return losses


def running_text(stream: torch.Tensor, steps: int) -> list[Batch]:
    """`steps` batches of windows that begin anywhere in the text; every position has a target."""
    length = min(LENGTH, len(stream) - 1)
    batches = []
    for _ in range(steps):
        begins = torch.randint(0, len(stream) - length, (ROWS, 1))
        windows = stream[begins + torch.arange(length + 1)]
        batches.append(Batch(windows[:, :-1], torch.ones(ROWS, length, dtype=torch.long), windows[:, 1:]))
    return batches
