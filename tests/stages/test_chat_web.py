"""`nf4kernels chat --web` in headless Chromium: type, see the answer stream, stop, clear, switch the adapter."""

import os
import shutil
import socket
import string
import time
from urllib.parse import urlsplit

import pytest
from support.chat_session import directories

gradio = pytest.importorskip("gradio", reason="gradio is not installed: no page is served")

from nf4kernels.stages.chat.loading import load  # noqa: E402
from nf4kernels.stages.chat.session import Sampling, Session  # noqa: E402
from nf4kernels.stages.chat.web import Page, build  # noqa: E402
from nf4kernels.stages.errors import StageError  # noqa: E402

QUESTION = "0. What colour is the apple?"
OTHER = "1. What colour is the grass?"
SECONDS = 30_000  # for what the page waits, in milliseconds


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Its answers are letters and spaces, which a page shows as they are, and it takes its time for each token."""
    made = directories(tmp_path_factory.mktemp("chat"))
    adapters = [str(made["first"]), f"other={made['second']}"]
    session = load(made["model"], adapters, sampling=Sampling(temperature=0, max_new_tokens=40))
    tokens = [session.tokenizer.decode([token]) for token in range(len(session.tokenizer))]
    plain = [i for i, token in enumerate(tokens) if not all(c in " " + string.ascii_letters for c in token)]
    session.model.generation_config.suppress_tokens = [*plain, *session.tokenizer.all_special_ids]
    session.model.get_base_model().register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return session


@pytest.fixture(scope="module")
def page(session):
    with Page(session) as served:
        yield served


@pytest.fixture
def view(page):
    """The page in a browser, and the addresses that it asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page is looked at")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: no page is looked at")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(SECONDS)
        tab.addresses = []
        tab.on("request", lambda request: tab.addresses.append(request.url))
        tab.goto(page.url)
        tab.locator("#question textarea").wait_for()
        yield tab
        browser.close()


def ask(view, text):
    view.locator("#question textarea").fill(text)
    view.locator("#question textarea").press("Enter")
    view.locator("#question .stop-button").wait_for()


def answer(view):
    """The last one as far as it stands there."""
    shown = [text for text in view.locator(".bot.message").all_inner_texts() if text.strip() != "Loading content"]
    return " ".join(shown[-1].split()) if shown else ""


def whole_answer(view, count):
    """The last of so many when it has ended: the button that stops it has gone then."""
    view.wait_for_function(f"document.querySelectorAll('.bot.message').length == {count}")
    view.locator("#question .submit-button").wait_for()
    return answer(view)


def expected(session, *questions, adapter="first"):
    """The last answer of the conversation, without a page."""
    own = Session(session.model, session.tokenizer, session.adapters, sampling=session.sampling)
    own.switch(adapter)
    for question in questions:
        said = "".join(own.answer(question))
    return " ".join(said.split())


def choose(view, adapter):
    view.get_by_label("Adapter").click()
    view.get_by_role("option", name=adapter, exact=True).click()


@pytest.mark.slow
def test_an_answer_streams_and_the_history_is_kept(view, session):
    ask(view, QUESTION)
    seen = []
    while view.locator("#question .stop-button").count():
        seen.append(answer(view))
        view.wait_for_timeout(100)
    first = whole_answer(view, 1)
    assert first == expected(session, QUESTION)
    lengths = sorted({len(text) for text in seen if first.startswith(text)})
    assert len(lengths) > 3, f"the answer came in {len(lengths)} pieces"
    ask(view, OTHER)
    assert whole_answer(view, 2) == expected(session, QUESTION, OTHER) != expected(session, OTHER)
    assert {urlsplit(address).hostname for address in view.addresses} == {"127.0.0.1"}


@pytest.mark.slow
def test_clear(view, session):
    ask(view, QUESTION)
    whole_answer(view, 1)
    view.get_by_role("button", name="Clear").click()
    view.wait_for_function("document.querySelectorAll('.message').length == 0")
    ask(view, OTHER)
    assert whole_answer(view, 1) == expected(session, OTHER) != expected(session, QUESTION, OTHER)


@pytest.mark.slow
def test_the_adapter_is_switched_there_and_back(view, session):
    answers = {adapter: expected(session, QUESTION, adapter=adapter) for adapter in ("first", "other", "none")}
    assert len(set(answers.values())) == 3
    for adapter in ("other", "none", "first"):
        choose(view, adapter)
        ask(view, QUESTION)
        assert whole_answer(view, 1) == answers[adapter]
        view.get_by_role("button", name="Clear").click()
        view.wait_for_function("document.querySelectorAll('.message').length == 0")


@pytest.mark.slow
def test_stop_ends_the_answer_and_the_next_one_comes(view, session):
    view.get_by_label("Longest answer, in tokens").fill("200")
    ask(view, QUESTION)
    while not answer(view):
        view.wait_for_timeout(20)
    view.locator("#question .stop-button").click()
    stopped = whole_answer(view, 1)
    assert 0 < len(stopped) < len(expected(session, QUESTION)), "it was not stopped"
    view.get_by_role("button", name="Clear").click()
    view.get_by_label("Longest answer, in tokens").fill("40")
    ask(view, OTHER)
    assert whole_answer(view, 1) == expected(session, OTHER)


@pytest.mark.slow
def test_a_mistake_is_told_in_the_page(view, session):
    view.locator("#question textarea").fill("apple " * 300)
    view.locator("#question textarea").press("Enter")
    view.get_by_text("must be shorter than the 256 tokens").wait_for()


def test_a_port_that_is_taken_is_said(session):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StageError, match="must be free to listen at"):
        Page(session, port=taken.getsockname()[1])


def test_it_is_served_to_this_machine_alone_and_sends_nothing(page, session):
    assert urlsplit(page.url).hostname == "127.0.0.1"
    assert build(session).get_config_file()["analytics_enabled"] is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
