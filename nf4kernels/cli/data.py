"""nf4kernels data check: what is in a file of examples, before a model is trained on it."""

import argparse
import dataclasses
import json
from pathlib import Path

from .errors import CommandError, check_installed

NEEDED = ("transformers", "datasets", "trl")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("data", help="look at a file of examples before a fine-tune")
    verbs = parser.add_subparsers(metavar="VERB", dest="data_verb", required=True)
    check = verbs.add_parser(
        "check",
        help="format, counts, lengths, duplicates, broken lines, and one example as the model will see it",
        description="Read every example of the files and print what is there. Ends with exit code 1 where something "
        'is broken. A line is an object with "text", with "prompt" and "completion", with "messages" (turns with '
        '"role" and "content"), or with "instruction", "input" and "output".',
    )
    check.add_argument(
        "files", metavar="FILE", type=Path, nargs="+", help=".jsonl, .json, .parquet, or a saved dataset"
    )
    check.add_argument(
        "--model", type=Path, metavar="DIR", help="count tokens by this model's tokenizer, and show one example"
    )
    check.add_argument("--max-length", type=int, metavar="N", help="count the examples of more tokens than that")
    check.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    check.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    check_installed("data", NEEDED, "finetune")
    if args.max_length is not None and args.model is None:
        raise CommandError("data: --max-length must come with --model, whose tokenizer counts the tokens")
    if args.max_length is not None and args.max_length < 1:
        raise CommandError(f"data: --max-length must be 1 or more, got {args.max_length}")
    from ..stages.data.check import check

    report = check(args.files, args.model, args.max_length)
    if args.json:
        print(json.dumps(dataclasses.asdict(report) | {"good": report.good}, indent=2, ensure_ascii=False))
    else:
        _print(report, args.max_length)
    return 0 if report.good else 1


def _print(report, max_length: int | None) -> None:
    for path, count in report.files.items():
        print(f"{path}: {count} examples")
    print(f"form: {', '.join(f'{form} ({count})' for form, count in report.forms.items()) or 'none'}")
    print(f"exact duplicates: {report.duplicates}")
    for name, lengths in (("characters", report.characters), ("tokens", report.tokens)):
        if lengths:
            middle = f"median {str(lengths.median).removesuffix('.0')}, 95 % up to {lengths.p95}"
            print(f"{name} of an example: {lengths.least} to {lengths.most}, {middle}")
    if report.token_count is not None:
        print(f"tokens in all: {report.token_count}")
    if report.cut is not None:
        print(f"longer than {max_length} tokens, which a fine-tune cuts: {report.cut}")
    for problem in report.broken:
        print(f"broken: {problem}")
    if report.broken_count > len(report.broken):
        print(f"broken: {report.broken_count - len(report.broken)} more")
    if report.example is not None:
        print(f"one example as the model sees it, what it learns between ⟦ and ⟧:\n{report.example}")
