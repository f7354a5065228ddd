"""A model, its tokenizer and what was said: what the terminal and the page both ask."""

import contextlib
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..errors import StageError

NO_ADAPTER = "none"
Message = dict[str, str]  # "role" and "content"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token each time.
        top_p: the least share of the probability to draw from, 1 for all.
        top_k: how many of the likeliest tokens to draw from, 0 for all.
        max_new_tokens: the longest answer, in tokens.
        seed: the same conversation has the same answers; None draws anew each time.

    Raises:
        StageError: one of them is out of its range; the message names the option.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("temperature", 0, 100),
            ("top_p", 1e-6, 1),
            ("top_k", 0, 10**9),
            ("max_new_tokens", 1, 10**9),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise StageError(f"--{name.replace('_', '-')} must be {least} to {most}, got {value}")

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            return {**options, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {**options, "temperature": None, "top_p": None, "top_k": None}


class Session:
    """A conversation with a model.

    Args:
        model: a causal language model of transformers, or PEFT's around it.
        tokenizer: the model's. Without a chat template what was said so far is one text, and the model continues it.
        adapters: names of the adapters that the model has.
        system: the system prompt, or None for what the chat template says by itself.
        sampling: None is `Sampling()`.

    Attributes:
        history: what was said, messages of "user" and "assistant" in turn.
        adapter: the name of the adapter that answers, or "none".

    Raises:
        StageError: the chat template takes no system prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: Sequence[str] = (),
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapters = list(adapters)
        self.adapter = self.adapters[0] if self.adapters else NO_ADAPTER
        self.sampling = sampling or Sampling()
        self.history: list[Message] = []
        self.system: str | None = None
        self._one_at_a_time = threading.Lock()
        self.set_system(system)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def clear(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.history = []

    def set_system(self, text: str | None) -> None:
        """Have another system prompt from now on, or with None or "" none; StageError where there can be none."""
        text = text or None
        if text is not None:
            if not self.has_template:
                raise StageError("a system prompt needs a model with a chat template, got a tokenizer without one")
            rendered = self._render([{"role": "user", "content": "?"}], text)
            if text.strip() not in rendered:
                raise StageError("a system prompt needs a chat template with room for one, got one that leaves it out")
        self.system = text

    def switch(self, adapter: str) -> None:
        """Answer with this adapter from now on, or with "none" of them; StageError for another name."""
        self._check_adapter(adapter)
        self.adapter = adapter

    def answer(self, text: str) -> Generator[str, None, None]:
        """Say `text`, and have the answer piece by piece; both are in the history when it has ended or was closed.

        A question that the model answers with nothing is forgotten.

        Raises:
            StageError: the conversation is longer than the model reads; the history is as it was.
        """
        said = [*self.history, {"role": "user", "content": text}]
        pieces: list[str] = []
        with contextlib.closing(self.reply(said)) as stream:
            try:
                for piece in stream:
                    pieces.append(piece)
                    yield piece
            finally:
                if pieces:
                    self.history = [*said, {"role": "assistant", "content": "".join(pieces)}]

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        adapter: str | None = None,
        system: str | None = None,
    ) -> Generator[str, None, None]:
        """Answer a conversation piece by piece, and leave the history alone; closing it stops the model.

        One answer is made at a time, whoever asks.

        Args:
            messages: what was said, the last by the user.
            sampling, adapter, system: None for the session's; "" is the template's own, if it has one.

        Raises:
            StageError: the conversation is longer than the model reads, or there is no such adapter.
        """
        sampling = sampling or self.sampling
        adapter = self.adapter if adapter is None else adapter
        self._check_adapter(adapter)
        inputs = self._encode(messages, self.system if system is None else system or None)
        room = self._context() - inputs["input_ids"].shape[1]
        if room < 1:
            raise StageError(
                f"the conversation must be shorter than the {self._context()} tokens that the model reads, got "
                f"{inputs['input_ids'].shape[1]}: clear it, or ask for less"
            )
        options = sampling.options()
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        with self._one_at_a_time:
            if self.adapters and adapter != NO_ADAPTER:
                self.model.set_adapter(adapter)
            off = self.model.disable_adapter() if self.adapters and adapter == NO_ADAPTER else contextlib.nullcontext()
            with off:
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed + len(messages))
                yield from self._generate(inputs, options)

    def _generate(self, inputs: Any, options: dict[str, Any]) -> Generator[str, None, None]:
        """In a thread of its own, which has ended when this has."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = _Stop()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self.model.generate(
                    **inputs, **options, eos_token_id=self._ends(), pad_token_id=self._pad(), streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )  # fmt: skip
            except BaseException as error:  # raised again where the answer is read
                failures.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                if piece:
                    yield piece
        finally:
            stop.asked.set()
            thread.join()
        if failures:
            raise failures[0]

    def _encode(self, messages: Sequence[Message], system: str | None) -> Any:
        if self.has_template:
            rendered = self._render(messages, system)
            encoded = self.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
        else:
            text = "".join(
                "\n" + message["content"] if place and message["role"] == "user" else message["content"]
                for place, message in enumerate(messages)
            )
            encoded = self.tokenizer(text, return_tensors="pt")
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _render(self, messages: Sequence[Message], system: str | None) -> str:
        first = [{"role": "system", "content": system}] if system else []
        try:
            text: str = self.tokenizer.apply_chat_template(
                [*first, *messages], add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            what = "takes no system prompt" if system else "failed"
            raise StageError(f"the model's chat template {what}: {error}") from None
        return text

    def _context(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31)

    def _ends(self) -> list[int] | None:
        """The model's own ends and the tokenizer's, which a fine-tune may have changed."""
        own = self.model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        return sorted(ends) or None

    def _pad(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _check_adapter(self, adapter: str) -> None:
        if adapter not in (*self.adapters, NO_ADAPTER):
            raise StageError(f"an adapter must be one of {', '.join((*self.adapters, NO_ADAPTER))}, got {adapter}")


class _Stop(StoppingCriteria):
    """Ends the answer at the next token once it is asked."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)
