"""A session in a page: gradio's chat interface, with the adapters and the sampling options beside it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import gradio

from ..errors import StageError
from .session import NO_ADAPTER, Sampling, Session

TITLE = "nf4kernels chat"
OWN_ADDRESSES = ("127.0.0.1", "localhost", "::1")


class Page:
    """The page of a session, served from its making until it is closed; each visitor has a history of their own.

    Nothing is fetched from outside and nothing is sent there: gradio's analytics and its share link are off.

    Args:
        session: answers.
        host: the address to listen at; others than this machine's own let everyone in who reaches it.
        port: None is the first free one from 7860 on.

    Attributes:
        url: where the page is.

    Raises:
        StageError: host and port cannot be listened at.
    """

    def __init__(self, session: Session, host: str = "127.0.0.1", port: int | None = None) -> None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # asked by gradio beside what Blocks is told
        self._blocks = build(session)
        try:
            self._blocks.launch(
                server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, ssr_mode=False,
                footer_links=[], enable_monitoring=False, mcp_server=False, pwa=False,
            )  # fmt: skip
        except (OSError, ValueError, OverflowError) as error:
            raise StageError(f"--host and --port must be free to listen at, got {host} and {port}: {error}") from None
        self.url: str = self._blocks.local_url

    def wait(self) -> None:
        """Until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            self._blocks.server.thread.join()

    def close(self) -> None:
        self._blocks.close(verbose=False)

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def build(session: Session) -> gradio.Blocks:
    """The page, not served yet."""
    own = session.sampling
    names = [*session.adapters, NO_ADAPTER]

    def answer(
        text: str, history: list[dict[str, Any]], adapter: str, system: str, temperature: float, top_p: float,
        top_k: float | None, max_new_tokens: float | None,
    ) -> Iterator[str]:  # fmt: skip
        said = [{"role": message["role"], "content": _text_of(message["content"])} for message in history]
        so_far = ""
        try:
            top_k = own.top_k if top_k is None else int(top_k)  # an emptied field
            most = own.max_new_tokens if max_new_tokens is None else int(max_new_tokens)
            sampling = Sampling(temperature, top_p, top_k, most, own.seed)
            messages = [*said, {"role": "user", "content": text}]
            for piece in session.reply(messages, sampling, adapter, system):
                so_far += piece
                yield so_far
        except StageError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title=TITLE, analytics_enabled=False, fill_height=True) as blocks:
        with gradio.Sidebar():
            gradio.Markdown(f"### {TITLE}")
            options = [
                gradio.Dropdown(
                    names, value=session.adapter, label="Adapter", interactive=True, visible=len(names) > 1
                ),
                gradio.Textbox(session.system or "", label="System prompt", lines=2, visible=session.has_template),
                gradio.Slider(
                    0,
                    max(2, own.temperature),
                    own.temperature,
                    step=0.05,
                    label="Temperature",
                    info="0 is the likeliest token",
                ),
                gradio.Slider(min(0.05, own.top_p), 1, own.top_p, step=0.05, label="Top p", info="1 is all tokens"),
                gradio.Number(own.top_k, precision=0, minimum=0, label="Top k", info="0 is all tokens"),
                gradio.Number(own.max_new_tokens, precision=0, minimum=1, label="Longest answer, in tokens"),
            ]
        gradio.ChatInterface(
            answer,
            chatbot=gradio.Chatbot(
                show_label=False, scale=1, buttons=["copy"], placeholder=_placeholder(session), latex_delimiters=[]
            ),
            textbox=gradio.Textbox(
                show_label=False, placeholder="Type a message...", submit_btn=True, stop_btn=True, elem_id="question"
            ),
            additional_inputs=options,
            analytics_enabled=False,
            api_visibility="private",
            flagging_mode="never",
            concurrency_limit=1,
        )
    return blocks


def _placeholder(session: Session) -> str:
    if session.has_template:
        return "Ask something."
    return "The model has no chat template: it continues the text so far."


def _text_of(content: Any) -> str:
    """Of a message as gradio has it: a string, or a list of parts that have text."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)
