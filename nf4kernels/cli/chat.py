"""`nf4kernels chat`: talk to a base or fine-tuned model, in the terminal or in a page."""

import argparse
import sys
from pathlib import Path

from .errors import check_cpu_computes, check_installed

PACKAGES = ("transformers", "peft", "accelerate")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a base or fine-tuned model, in the terminal or with --web in a page",
        description="Talk to MODEL, a Hugging Face directory: a dense model is quantized to NF4 as it loads, one in 4 "
        "bits is loaded as it is, and of an adapter the base is loaded that its adapter_config.json names. A line is "
        "a question, /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends. At a pipe standard output has the "
        "answers alone.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="directory of a model, or of an adapter")
    parser.add_argument(
        "--adapter", metavar="[NAME=]DIR", action="append", default=[],
        help="a fine-tune on MODEL; several can be switched with /adapter NAME, and the first answers at first",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default what the chat template has)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from this share, 1 is all (default 0.95)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many tokens, 0 is all (default 0)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")
    parser.add_argument("--seed", type=int, help="the same conversation has the same answers then")
    parser.add_argument("--dense", action="store_true", help="do not quantize a dense model")
    parser.add_argument("--web", action="store_true", help="in a page of the browser, rather than in the terminal")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page (default this machine's own alone)")
    parser.add_argument("--port", type=int, help="of the page (default the first free one from 7860)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes("chat")
    check_installed("chat", (*PACKAGES, "gradio") if args.web else PACKAGES, "chat")
    from ..stages.chat.loading import load
    from ..stages.chat.session import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_new_tokens, args.seed)
    session = load(args.model, args.adapter, args.system, sampling, args.dense)
    if not args.web:
        from ..stages.chat.terminal import converse

        converse(session)
        return
    from ..stages.chat.web import Page

    with Page(session, args.host, args.port) as page:
        print(f"{page.url} (Ctrl-C ends)", file=sys.stderr, flush=True)
        page.wait()
