"""nf4kernels info: what would run on this machine, and why."""

import argparse
import dataclasses
import json

import torch

from .. import __version__
from ..backends.info import backend_info


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("info", help="what would run on this machine, and why")
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    info = backend_info()
    if args.json:
        versions = {"nf4kernels": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        print(json.dumps(versions | dataclasses.asdict(info), indent=2))
        return
    print(f"nf4kernels {__version__}")
    print(info)
