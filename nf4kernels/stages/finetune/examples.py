"""The examples as the trainer is to get them, and as a person is shown them."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..data.view import View, begun, marked, missing_beginning
from ..errors import StageError

IGNORED = -100  # the label of a token without a loss


@dataclass
class Counts:
    """Of one set of examples: rows, the tokens that a cut to max_length leaves, rows that were longer, most in a row.

    Of rows with images the rows alone are counted. `lost` rows have nothing to learn after the cut, and are left out.
    """

    examples: int
    tokens: int
    cut: int
    longest: int
    lost: int = 0


def in_chat_form(rows: Dataset, form: str, tokenizer: Any) -> Dataset:
    """Rows of a form that the model knows: turns of a chat where it has a template, plain text with BOS elsewhere.

    TRL appends the EOS token to plain text; BOS is put first here where the tokenizer does not do that by itself.

    Raises:
        StageError: messages for a model without a chat template.
    """
    if form == "messages":
        if not tokenizer.chat_template:
            raise StageError(
                "--chat_template_path must be a Jinja file: the data is chat messages, and"
                " the model's tokenizer has no chat template"
            )
        return rows
    if form == "prompt" and isinstance(rows[0]["prompt"], str) and tokenizer.chat_template:
        return rows.map(_as_turns)
    column = "prompt" if form == "prompt" else "text"
    beginning = missing_beginning(tokenizer) if isinstance(rows[0][column], str) else ""
    if not beginning:
        return rows
    return rows.map(lambda row: {column: begun(row[column], beginning)})


def counts(rows: Dataset, max_length: int | None) -> Counts:
    lengths = [len(ids) for ids in rows["input_ids"]]
    cut = sum(max_length is not None and length > max_length for length in lengths)
    return Counts(len(lengths), sum(lengths), cut, max(lengths))


def shown(row: dict[str, Any], tokenizer: Any) -> str:
    """The text of a row that the trainer tokenized, what has a loss between ⟦ and ⟧."""
    ids = row["input_ids"]
    has_loss = [label != IGNORED for label in row["labels"]] if "labels" in row else row.get("completion_mask")
    has_loss = has_loss or row.get("assistant_masks") or [1] * len(ids)
    return marked(View(ids, [bool(has) for has in has_loss]), tokenizer)


def _as_turns(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
