"""`nf4kernels chat` through a pipe and at a terminal: lines in, answers out, commands obeyed."""

import io
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from support.chat_model import chat_model
from support.chat_session import directories

from nf4kernels.cli import main
from nf4kernels.stages.chat.loading import load
from nf4kernels.stages.chat.session import Sampling, Session

QUESTION = "0. What colour is the apple?"
OPTIONS = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return directories(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def loaded(made):
    sampling = Sampling(temperature=0, max_new_tokens=12)
    return load(made["model"], [str(made["first"]), f"other={made['second']}"], sampling=sampling)


@pytest.fixture
def at_pipe(made, monkeypatch, capsys):
    """Standard output and error of the command, given the lines of standard input."""

    def run(*lines, model="model", options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(made[model]), *OPTIONS, *options]) == 0
        return capsys.readouterr()

    return run


def test_answers_commands_and_adapters(at_pipe, made, loaded):
    adapters = ("--adapter", str(made["first"]), "--adapter", f"other={made['second']}")
    lines = [QUESTION, "And the sky?", "/clear", "/adapter other", QUESTION, "/clear", "/adapter none", QUESTION]
    lines += ["/clear", "/adapter first", "/system Answer in verse.", QUESTION, "/help", "/exit", "never asked"]
    session, expected = Session(loaded.model, loaded.tokenizer, loaded.adapters, sampling=loaded.sampling), []
    for line in lines[: lines.index("/help")]:
        command, _, rest = line.partition(" ")
        if command == "/clear":
            session.clear()
        elif command == "/adapter":
            session.switch(rest)
        elif command == "/system":
            session.set_system(rest)
        else:
            expected.append("".join(session.answer(line)))
    assert len(set(expected)) == 5
    seen = at_pipe(*lines, options=adapters)
    assert seen.out == "".join(f"{answer}\n" for answer in expected)
    for note in ("cleared\n", "adapter: other (of first, other, none)\n", "system prompt: Answer in verse.\n"):
        assert note in seen.err
    assert "/adapter NAME" in seen.err


def test_mistakes_are_told_and_the_conversation_goes_on(at_pipe):
    seen = at_pipe("/adapter other", "/bogus", "", "apple " * 300, QUESTION)
    assert "an adapter must be one of none, got other" in seen.err
    assert "a command must be one of these, got /bogus" in seen.err
    assert "must be shorter than the 256 tokens" in seen.err
    assert seen.out == at_pipe(QUESTION).out


def test_errors_end_with_one_line(made, capsys, tmp_path):
    for options, message in (
        ([str(tmp_path)], f"MODEL must be a directory with a config.json or an adapter_config.json, got {tmp_path}"),
        ([str(made["model"]), "--top-p", "2"], "--top-p must be 1e-06 to 1, got 2.0"),
        ([str(made["plain"]), "--system", "x"], "a system prompt needs a model with a chat template, got a tokenizer"),
    ):
        assert main(["chat", *options]) == 2
        assert f"nf4kernels chat: {message}" in capsys.readouterr().err


def command(*args):
    return [sys.executable, "-m", "nf4kernels", "chat", *map(str, args)]


def heed_interrupts():
    """As at a terminal: what a shell starts in its background ignores them, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there is no pseudo-terminal on this system")
def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(tmp_path):
    """A long answer is stopped in the middle, the next one is whole, and the end is an end without an error."""
    ours, theirs = os.openpty()
    model = chat_model(tmp_path / "model", initializer_range=0.2, max_position_embeddings=4096)
    args = command(model, "--temperature", "0", "--max-new-tokens", "4000", "--dense")
    process = subprocess.Popen(
        args, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=heed_interrupts
    )
    os.close(theirs)
    seen = b""

    def read_until(text, seconds=60):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            ready, _, _ = select.select([ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} came, but {seen!r}"
            seen += os.read(ours, 4096)
        before, _, seen = seen.partition(text)
        return before

    try:
        read_until(b"Ctrl-D ends.")
        read_until(b"> ")
        os.write(ours, QUESTION.encode() + b"\n")
        read_until(QUESTION.encode() + b"\r\n")
        while len(seen) < 3:
            seen += os.read(ours, 1)
        process.send_signal(signal.SIGINT)
        read_until(b"(stopped)")
        read_until(b"> ")
        for _ in range(20):  # readline shows its prompt before it waits: a signal between the two is not seen
            process.send_signal(signal.SIGINT)
            if select.select([ours], [], [], 1)[0]:
                break
        read_until(b"(Ctrl-D or /exit ends)")
        read_until(b"> ")
        os.write(ours, b"/adapter\n")
        read_until(b"adapter: none (of none)")
        read_until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
