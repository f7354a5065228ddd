"""The command line, one verb a file.

A verb's module has `add_parser(subparsers)`, which adds its parser with `run` as the default of `func`, and
`run(args)`, which does the work, may return an exit code, and raises CommandError for what the user can put right.
Frameworks like transformers and matplotlib are imported inside `run`, so that the other verbs work without them.
"""

import argparse
import sys
from collections.abc import Sequence

from . import convert, demo, info, quantize, tune
from .errors import CommandError

VERBS = (info, demo, quantize, convert, tune)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit code, 2 after an error of the user's, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="nf4kernels", description="4-bit NormalFloat weights for PyTorch.")
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.func(args) or 0
    except CommandError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
