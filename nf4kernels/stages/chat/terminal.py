"""A session in the terminal, or at a pipe: a line is a question, and a line that begins with a slash a command."""

import contextlib
import sys
from typing import TextIO

from ..errors import StageError, first_line
from .session import NO_ADAPTER, Session

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  # input() edits lines and remembers them, once it is imported

HELP = """\
/adapter NAME   answer with this adapter; /adapter none with the base model; /adapter alone lists them
/system TEXT    another system prompt; /system alone has that of the template, where it has one
/clear          forget what was said
/help           this list
/exit           end, as Ctrl-D does
Ctrl-C stops an answer."""


def converse(session: Session, notes: TextIO | None = None) -> None:
    """Read questions from standard input until it ends, and write the answers to standard output as they come.

    Args:
        session: answers, and keeps the history.
        notes: where all but the answers goes; None is standard error.
    """
    notes = notes or sys.stderr
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(_greeting(session), file=notes, flush=True)
    while True:
        try:
            line = input("> " if at_terminal else "")
        except EOFError:
            if at_terminal:
                print(file=notes)
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print("\n(Ctrl-D or /exit ends)", file=notes, flush=True)
            continue
        try:
            if line.startswith("/"):
                if _obey(session, line, notes):
                    return
            elif line.strip() or (session.history and not session.has_template):
                _print_answer(session, line, notes)
        except StageError as error:
            print(error, file=notes, flush=True)
        except RuntimeError as error:  # of torch: no memory left, say
            print(f"\nthe answer failed: {first_line(error)}", file=notes, flush=True)


def _print_answer(session: Session, line: str, notes: TextIO) -> None:
    with contextlib.closing(session.answer(line)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="", file=notes, flush=True)
    print(flush=True)


def _obey(session: Session, line: str, notes: TextIO) -> bool:
    """Whether the command ends the conversation."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command == "/exit":
        return True
    if command == "/adapter":
        if rest:
            session.switch(rest)
        print(f"adapter: {session.adapter} (of {', '.join((*session.adapters, NO_ADAPTER))})", file=notes, flush=True)
    elif command == "/system":
        session.set_system(rest)
        said = session.system or "the template's, where it has one"
        print(f"system prompt: {said}", file=notes, flush=True)
    elif command == "/clear":
        session.clear()
        print("cleared", file=notes, flush=True)
    elif command == "/help":
        print(HELP, file=notes, flush=True)
    else:
        print(f"a command must be one of these, got {command}\n{HELP}", file=notes, flush=True)
    return False


def _greeting(session: Session) -> str:
    lines = []
    if session.adapters:
        lines.append(f"adapter: {session.adapter} (of {', '.join((*session.adapters, NO_ADAPTER))})")
    if not session.has_template:
        lines.append("The model has no chat template: it continues the text so far, and Enter alone has it go on.")
    lines.append("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    return "\n".join(lines)
