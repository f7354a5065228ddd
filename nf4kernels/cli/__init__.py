"""The command line, one verb a file.

A verb's module has `add_parser(subparsers)`, which adds its parser with `run` as the default of `func`, and
`run(args)`, which calls the stage, prints what came of it, may return an exit code, and raises CommandError for what
the user can put right. Stages and frameworks are imported inside `run`, so that the other verbs work without them.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from ..stages.errors import StageError
from . import (
    chat,
    compare,
    completion,
    convert,
    data,
    demo,
    estimate,
    export,
    finetune,
    info,
    inspect,
    merge,
    quantize,
    recipes,
    recover,
    tune,
)
from .errors import CommandError

VERBS = (
    info,
    tune,
    estimate,
    inspect,
    quantize,
    convert,
    compare,
    data,
    recipes,
    finetune,
    recover,
    merge,
    export,
    chat,
    demo,
    completion,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit code, 2 after an error of the user's, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="nf4kernels", description="4-bit NormalFloat weights for PyTorch.")
    parser.set_defaults(parser=parser)  # completion describes it
    subparsers = parser.add_subparsers(metavar="VERB", dest="verb", required=True)
    for verb in VERBS:
        verb.add_parser(subparsers)
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale without Ŵ, or a name that is no UTF-8
    try:
        code = args.func(args) or 0
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"{parser.prog} {error}", file=sys.stderr)
        return 2
    except StageError as error:
        print(f"{parser.prog} {args.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of stdout, whose reader has enough: Python would complain of it once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno is None:  # not of the system
            raise
        print(f"{parser.prog} {args.verb}: {error}", file=sys.stderr)  # a full disk, say
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog} {args.verb}: interrupted", file=sys.stderr)
        return 130
