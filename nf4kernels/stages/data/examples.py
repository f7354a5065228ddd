"""The forms of an example, and what is wrong with one that has none of them."""

from typing import Any

FORMS = ("messages", "prompt", "text")
ROLES = ("system", "user", "assistant", "tool")
BEFORE = {  # whose turn comes before it; "" is the beginning
    "assistant": ("user", "tool"),
    "user": ("", "system", "assistant"),
    "tool": ("assistant", "tool"),
}
EXPECTED = "text, prompt and completion, messages, or instruction and output"
# The prompt of Stanford Alpaca (tatsu-lab/stanford_alpaca, README), which its data was made for.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class ExampleError(ValueError):
    """What is wrong with one example, without its place."""


def example(record: Any) -> tuple[str, dict[str, Any]]:
    """(form, the columns that TRL reads) of one record; keys beyond its form's are left out.

    A record with `images`, a list of paths, or `image`, one path, has `images` in its row, as they were given.

    Raises:
        ExampleError: the record has no form, or an empty or misplaced part.
    """
    if not isinstance(record, dict):
        raise ExampleError(f"must be an object with {EXPECTED}, got {type(record).__name__}")
    form, row = _text_of(record)
    images = record.get("images")
    if record.get("image") is not None:
        images = [record["image"]]
    if images is None:
        return form, row
    if form == "text":
        raise ExampleError("images must stand beside messages or prompt and completion, got text")
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ExampleError(f"images must be a list of paths, got {repr(images)[:40]}")
    return form, {**row, "images": images}


def _text_of(record: dict) -> tuple[str, dict[str, Any]]:
    if record.get("tools"):
        raise ExampleError("tools are not read: leave them out, or write them into the system's turn")
    if record.get("messages") is not None:
        _check_messages("messages", record["messages"])
        return "messages", {"messages": [_turn(turn) for turn in record["messages"]]}
    if record.get("prompt") is not None and record.get("completion") is not None:
        return "prompt", _prompt_and_completion(record)
    if record.get("instruction") is not None and record.get("output") is not None:
        for name in ("instruction", "output"):
            _check_text(name, record[name])
        given = record.get("input") or ""
        if given != "":
            _check_text("input", given, may_be_blank=True)
        prompt = WITH_INPUT if given.strip() else WITHOUT_INPUT
        parts = {"instruction": record["instruction"], "input": given}
        return "prompt", {"prompt": prompt.format_map(parts), "completion": record["output"]}
    if record.get("text") is not None:
        _check_text("text", record["text"])
        return "text", {"text": record["text"]}
    raise ExampleError(f"must have the keys {EXPECTED}, got {', '.join(map(str, record)) or 'none'}")


def _prompt_and_completion(record: dict) -> dict[str, Any]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        _check_messages("prompt and completion", prompt + completion)
        if not completion:
            raise ExampleError("completion must hold the assistant's turn, got an empty list")
        return {"prompt": [_turn(turn) for turn in prompt], "completion": [_turn(turn) for turn in completion]}
    _check_text("prompt", prompt)
    _check_text("completion", completion)
    return {"prompt": prompt, "completion": completion}


def _check_text(name: str, value: Any, may_be_blank: bool = False) -> None:
    if not isinstance(value, str):
        raise ExampleError(f"{name} must be a string, got {type(value).__name__}")
    if not may_be_blank and not value.strip():
        raise ExampleError(f"{name} must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ExampleError(f"{name} must be text, got half a surrogate pair at character {error.start + 1}") from None


def _check_messages(name: str, turns: Any) -> None:
    if not isinstance(turns, list) or not turns:
        raise ExampleError(f"{name} must be a list of turns, got {'an empty one' if turns == [] else repr(turns)[:40]}")
    last = ""
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of {name}"
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            role = turn.get("role") if isinstance(turn, dict) else turn
            raise ExampleError(f"{where} must have a role of {', '.join(ROLES)}, got {str(role)[:40]!r}")
        role = turn["role"]
        if not (turn.get("tool_calls") and role == "assistant"):
            _check_text(f"the content of {where}", turn.get("content"))
        if turn.get("name"):
            _check_text(f"the name of {where}", turn["name"])
        if role == "system" and number > 1:
            raise ExampleError(f"{where} must not be the system's, which is the first or none")
        if last not in BEFORE.get(role, (last,)):
            raise ExampleError(
                f"{where} must follow {' or '.join(filter(None, BEFORE[role]))}, got {role} after {last or 'nothing'}"
            )
        last = role
    if last != "assistant":
        raise ExampleError(f"{name} must end with the assistant's turn, which is learned, got the {last}'s")


def _turn(turn: dict) -> dict[str, Any]:
    kept = {"role": turn["role"], "content": turn.get("content") or ""}
    return kept | {name: turn[name] for name in ("tool_calls", "name") if turn.get(name)}
