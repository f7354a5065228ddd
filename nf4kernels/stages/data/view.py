"""An example as the model gets it: its tokens, and which of them have a loss."""

from dataclasses import dataclass
from typing import Any

from trl.chat_template_utils import get_training_chat_template
from trl.data_utils import is_conversational

from ..errors import StageError

SHOWN = 400  # characters of an example that is shown


@dataclass(frozen=True)
class View:
    ids: list[int]
    has_loss: list[bool]


class Viewer:
    """Tokenizes rows as TRL's SFTTrainer does with the loss on answers alone.

    Raises:
        StageError: the rows are chat messages, and the tokenizer has no chat template, or a broken one.
    """

    def __init__(self, tokenizer: Any, form: str) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.template = None
        if form == "messages" and not tokenizer.chat_template:
            raise StageError("the model's tokenizer must have a chat template for chat messages, got none")
        if form == "messages":
            try:
                self.template = get_training_chat_template(tokenizer) or tokenizer.chat_template
            except ValueError:  # TRL has no version of it that marks the answers: then all has a loss
                self.template = tokenizer.chat_template

    def view(self, row: dict[str, Any]) -> View:
        """Tokens of one row, before any is cut; StageError where the chat template refuses it."""
        if self.form == "messages" or is_conversational(row):
            return self._of_turns(row.get("messages") or row["prompt"] + row["completion"])
        if self.form == "prompt" and self.tokenizer.chat_template:
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            return self._of_turns(turns, asked=turns[:1])
        end = self.tokenizer.eos_token or ""
        if self.form == "prompt":
            prompt = self._ids(row["prompt"])
            ids = self._ids(row["prompt"] + row["completion"] + end)
            shared = next((i for i, (a, b) in enumerate(zip(prompt, ids)) if a != b), min(len(prompt), len(ids)))
            return View(ids, [i >= shared for i in range(len(ids))])
        ids = self._ids(row["text"] + end)
        return View(ids, [True] * len(ids))

    def marked(self, view: View) -> str:
        """The text of `view`, what has a loss between ⟦ and ⟧."""
        text, start = "", 0
        for end in range(1, len(view.ids) + 1):
            if end == len(view.ids) or view.has_loss[end] != view.has_loss[start]:
                piece = self.tokenizer.decode(view.ids[start:end], clean_up_tokenization_spaces=False)
                text += f"⟦{piece}⟧" if view.has_loss[start] else piece
                start = end
        return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"

    def _ids(self, text: str) -> list[int]:
        begin = self.tokenizer.bos_token
        ids = self.tokenizer(text)["input_ids"]
        if begin is not None and ids[:1] != [self.tokenizer.bos_token_id]:
            ids = self.tokenizer(begin + text)["input_ids"]
        return ids

    def _of_turns(self, turns: list[dict], asked: list[dict] | None = None) -> View:
        options = {"chat_template": self.template, "tokenize": True, "return_dict": True}
        try:
            if asked is not None:
                prompt = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)["input_ids"]
                ids = self.tokenizer.apply_chat_template(turns, **options)["input_ids"]
                shared = next((i for i, (a, b) in enumerate(zip(prompt, ids)) if a != b), min(len(prompt), len(ids)))
                return View(ids, [i >= shared for i in range(len(ids))])
            done = self.tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, **options)
        except Exception as error:  # what a Jinja template raises has no common type
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StageError(f"the chat template refuses an example: {first}") from None
        mask = done.get("assistant_masks") or []
        has_loss = [bool(token) for token in mask] if any(mask) else [True] * len(done["input_ids"])
        return View(done["input_ids"], has_loss)
