"""nf4kernels completion: what a shell reads to complete verbs, flags and their choices."""

import argparse

from .errors import check_installed

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="print the completion of this command line for a shell",
        description="Print what SHELL reads to complete this command line. For bash: "
        "nf4kernels completion bash > ~/.local/share/bash-completion/completions/nf4kernels; for zsh the file is "
        "_nf4kernels in a folder of $fpath. A new shell knows it.",
    )
    parser.add_argument(
        "shell", metavar="SHELL", choices=SHELLS, help=" or ".join((", ".join(SHELLS[:-1]), SHELLS[-1]))
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_installed("completion", ["shtab"], "completion")
    import shtab

    print(shtab.complete(args.parser, args.shell))
