"""What the trained model answers to examples of the data."""

import math
from typing import Any

import torch
from trl.data_utils import prepare_multimodal_messages

from ..data.reading import Split
from ..data.view import begun, missing_beginning

SAMPLES = 3
LOOKED_AT = 8  # times as many examples, at most, for some that are short enough
ANSWER_TOKENS = 64
PROMPT_TOKENS = 16  # of a plain text, to go on from


def answers(
    model: Any, split: Split, processor: Any, count: int = SAMPLES, max_length: int | None = None
) -> list[tuple[str, str, str]]:
    """(asked, in the data, answered) of the first `count` examples held out, by greedy decoding.

    Examples whose prompt is beyond max_length, or beyond the model's positions with the answer, are passed over.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = min(max_length or math.inf, positions - ANSWER_TOKENS)
    tokenizer = processor.tokenizer if split.has_images else processor
    rows = split.held_out if len(split.held_out) else split.train
    made: list[tuple[str, str, str]] = []
    for row in rows.select(range(min(LOOKED_AT * count, len(rows)))):
        if len(made) == count:
            break
        if split.has_images:
            inputs, asked, expected = _prompt_with_images(row, split.form, processor)
        else:
            ids, asked, expected = _prompt(row, split.form, tokenizer)
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if inputs["input_ids"].shape[1] > longest:
            continue
        inputs = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }
        model.eval()
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        answer = out[0, inputs["input_ids"].shape[1] :]
        made.append((asked, expected, tokenizer.decode(answer, skip_special_tokens=True)))
    return made


def _prompt_with_images(row: dict[str, Any], form: str, processor: Any) -> tuple[Any, str, str]:
    """As `_prompt`, with the tensors of the images before the first turn of the user's, where TRL has them."""
    turns, asked, expected = _turns(row, form)
    inputs = processor.apply_chat_template(
        prepare_multimodal_messages(turns, images=row["images"]), add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    return inputs, asked, expected


def _prompt(row: dict[str, Any], form: str, tokenizer: Any) -> tuple[list[int], str, str]:
    """Token ids to go on from, and as text what was asked and what the data answers."""
    if form == "text":
        ids = tokenizer(row["text"])["input_ids"][:PROMPT_TOKENS]
        asked = tokenizer.decode(ids, skip_special_tokens=True)
        return ids, asked, row["text"].removeprefix(asked)
    if form == "prompt" and isinstance(row["prompt"], str):
        asked, expected = row["prompt"], row["completion"]
        if not tokenizer.chat_template:
            return tokenizer(begun(asked, missing_beginning(tokenizer)))["input_ids"], asked, expected
    turns, asked, expected = _turns(row, form)
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"], asked, expected


def _turns(row: dict[str, Any], form: str) -> tuple[list[dict[str, Any]], str, str]:
    """The turns before the last answer, the last of them, and the answer."""
    if form == "prompt" and isinstance(row["prompt"], str):
        return [{"role": "user", "content": row["prompt"]}], row["prompt"], row["completion"]
    turns, last = (row["prompt"], row["completion"]) if form == "prompt" else (row["messages"], [])
    if form == "messages":
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        turns, last = turns[: places[-1]], turns[places[-1] :]
    return turns, str(turns[-1]["content"]), str(last[0]["content"])
