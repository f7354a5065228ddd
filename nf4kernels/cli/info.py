"""nf4kernels info: what would run on this machine, and why."""

import argparse

from .. import __version__
from ..backends.select import backend_info


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("info", help="what would run on this machine, and why")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    print(f"nf4kernels {__version__}")
    print(backend_info())
