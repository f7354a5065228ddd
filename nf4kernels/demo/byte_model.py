"""The model for machines without a network: a small Llama over bytes, trained here on the demonstration's own text."""

from pathlib import Path
from typing import Any

import torch

from ..model.training import training_dtype
from .data import PLAIN

SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ROWS, LENGTH = 16, 128


def make(directory: Path, answers: list[str], steps: int, seed: int) -> list[float]:
    """Train on `answers` as running text, save model and tokenizer; the loss of every tenth of the steps.

    Prompts are left out: how a prompt leads to an answer is what the fine-tuning has to teach.
    """
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    tokenizer = ByT5Tokenizer(extra_ids=0, chat_template=PLAIN.read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **SHAPE,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    text = "".join(answer.strip().capitalize() + "\n" for answer in answers)
    arguments = TrainingArguments(
        str(directory), max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=3e-3, weight_decay=0.1,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 10), bf16=training_dtype("cpu") == torch.bfloat16,
        use_cpu=True, seed=seed, logging_steps=max(1, steps // 10), save_strategy="no", report_to="none",
        dataloader_pin_memory=False,
    )  # fmt: skip
    rows = windows(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]), steps * ROWS)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def text_of(split: Any) -> list[str]:
    """What the held-in examples of a `stages.data.reading.Split` answer, or all of those that are plain text."""
    names = {"text": "text", "prompt": "completion", "messages": "messages"}
    answers = split.train[names[split.form]]
    return [answer if isinstance(answer, str) else answer[-1]["content"] for answer in answers]


def windows(stream: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
    """`count` pieces of the text that begin anywhere in it, as transformers' trainer takes them."""
    length = min(LENGTH, len(stream) - 1)
    begins = torch.randint(0, len(stream) - length, (count, 1))
    return [{"input_ids": piece, "labels": piece} for piece in stream[begins + torch.arange(length + 1)]]
