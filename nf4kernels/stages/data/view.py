"""An example as the model gets it: its tokens, and which of them have a loss."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from ..errors import StageError, first_line

SHOWN = 400  # characters of an example that is shown


@dataclass(frozen=True)
class View:
    ids: list[int]
    has_loss: list[bool]


class Viewer:
    """Tokenizes rows as TRL's SFTTrainer does with the loss on answers alone.

    Raises:
        StageError: the rows are chat messages, and the tokenizer has no chat template, or one whose answers neither it
            nor TRL's version of it marks.
    """

    def __init__(self, tokenizer: Any, form: str) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.template, self.beginning = None, missing_beginning(tokenizer)
        if form == "messages" and not tokenizer.chat_template:
            raise StageError("the model's tokenizer must have a chat template for chat messages, got none")
        if form == "messages":
            self.template = marking_template(tokenizer)

    def view(self, row: dict[str, Any]) -> View:
        """Tokens of one row, before any is cut; StageError where the chat template refuses it."""
        if self.form == "messages":
            done = self._of_turns(row["messages"], return_assistant_tokens_mask=True)
            if not any(done["assistant_masks"]):
                raise StageError("the chat template must mark an answer by {% generation %}, got none in this example")
            return View(done["input_ids"], [bool(token) for token in done["assistant_masks"]])
        end = self.tokenizer.eos_token or ""
        if self.form == "text":
            ids = self._of_text(row["text"].removesuffix(end) + end)
            return View(ids, [True] * len(ids))
        asked, answer = row["prompt"], row["completion"]
        if isinstance(asked, str) and self.tokenizer.chat_template:
            asked, answer = [{"role": "user", "content": asked}], [{"role": "assistant", "content": answer}]
        if isinstance(asked, str):
            prompt, ids = self._of_text(asked), self._of_text(asked + answer.removesuffix(end) + end)
        else:
            prompt = self._of_turns(asked, add_generation_prompt=True)["input_ids"]
            ids = self._of_turns(asked + answer)["input_ids"]
        shared = common_prefix_length(prompt, ids)
        return View(ids, [place >= shared for place in range(len(ids))])

    def _of_text(self, text: str) -> list[int]:
        return self.tokenizer(begun(text, self.beginning))["input_ids"]

    def _of_turns(self, turns: list[dict], **options: Any) -> dict[str, list[int]]:
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=True, return_dict=True, **options
            )
        except Exception as error:  # what a Jinja template raises has no common type
            raise StageError(f"the chat template refuses an example: {first_line(error)}") from None


def marking_template(tokenizer: Any) -> str | None:
    """TRL's version of the tokenizer's chat template, which marks the answers; None where its own does.

    Raises:
        StageError: neither does.
    """
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TemplateError):
        raise StageError(
            "the model's chat template must mark the answers by {% generation %}, and TRL has no version of it that"
            " does: give finetune one that does as --chat_template_path, or --assistant_only_loss false"
        ) from None


def marked(view: View, tokenizer: Any) -> str:
    """The text of `view`, what has a loss between ⟦ and ⟧."""
    text, start = "", 0
    for end in range(1, len(view.ids) + 1):
        if end == len(view.ids) or view.has_loss[end] != view.has_loss[start]:
            piece = tokenizer.decode(view.ids[start:end], clean_up_tokenization_spaces=False)
            text += f"⟦{piece}⟧" if view.has_loss[start] else piece
            start = end
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def missing_beginning(tokenizer: Any) -> str:
    """The BOS token as text where the tokenizer has one and does not put it first by itself, else ""."""
    begin = tokenizer.bos_token
    return "" if begin is None or tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else begin


def begun(text: str, beginning: str) -> str:
    """`text` with `beginning` first, once."""
    return text if text.startswith(beginning) else beginning + text
