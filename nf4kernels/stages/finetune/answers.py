"""What the trained model answers to examples of the data."""

from typing import Any

import torch

from ..data.reading import Split
from ..data.view import begun, missing_beginning

SAMPLES = 3
ANSWER_TOKENS = 64
PROMPT_TOKENS = 16  # of a plain text, to go on from


def answers(model: Any, split: Split, tokenizer: Any, count: int = SAMPLES) -> list[tuple[str, str, str]]:
    """(asked, in the data, answered) of the first `count` examples held out, by greedy decoding."""
    rows = split.held_out if len(split.held_out) else split.train
    made = []
    for row in rows.select(range(min(count, len(rows)))):
        ids, asked, expected = prompt_of(row, split.form, tokenizer)
        inputs = torch.tensor([ids], device=model.device)
        model.eval()
        with torch.no_grad():
            out = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=ANSWER_TOKENS, do_sample=False,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        made.append((asked, expected, tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)))
    return made


def prompt_of(row: dict[str, Any], form: str, tokenizer: Any) -> tuple[list[int], str, str]:
    """Token ids to go on from, and as text what was asked and what the data answers."""
    if form == "text":
        ids = tokenizer(row["text"])["input_ids"][:PROMPT_TOKENS]
        asked = tokenizer.decode(ids, skip_special_tokens=True)
        return ids, asked, row["text"].removeprefix(asked)
    if form == "prompt" and isinstance(row["prompt"], str):
        asked, expected = row["prompt"], row["completion"]
        if not tokenizer.chat_template:
            return tokenizer(begun(asked, missing_beginning(tokenizer)))["input_ids"], asked, expected
        turns = [{"role": "user", "content": asked}]
    else:
        turns, last = (row["prompt"], row["completion"]) if form == "prompt" else (row["messages"], [])
        if form == "messages":
            answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
            turns, last = turns[: answers[-1]], turns[answers[-1] :]
        asked, expected = str(turns[-1]["content"]), str(last[0]["content"])
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"], asked, expected
