"""`nf4kernels demo`: quantize a real language model, fine-tune it in 4 bits, evaluate, merge and save it."""

import argparse
from pathlib import Path

from ..demo.settings import PACKAGES, Settings
from ..storage.atomic import TargetError
from ..storage.directory_checks import ConversionError
from .errors import CommandError, check_cpu_computes, check_installed


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="quantize a real language model, fine-tune it in 4 bits, merge and save it",
        description="Quantizes SmolLM2-135M-Instruct (or --model) to NF4, fine-tunes LoRA adapters on word definitions "
        "(or --data) through the 4-bit weights, evaluates, merges and saves. Without a network it trains a small model "
        "over bytes and goes on with that. Takes a few minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Settings  # made, it would check them against what is here
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory of a causal language model")
    parser.add_argument("--data", type=Path, metavar="FILE", help="examples, as finetune takes them")
    parser.add_argument("--out", type=Path, metavar="DIR", default=default.out, help="directory to write")
    parser.add_argument("--cache", type=Path, metavar="DIR", default=default.cache, help="keeps the downloaded model")
    parser.add_argument("--steps", type=int, default=default.steps, help="fine-tuning steps")
    parser.add_argument("--batch", type=int, default=default.batch, help="examples in a step")
    parser.add_argument("--lr", type=float, default=default.lr, help="highest learning rate")
    parser.add_argument("--rank", type=int, default=default.rank, help="LoRA rank; alpha is twice that")
    parser.add_argument("--seed", type=int, default=default.seed, help="of adapters, order and held-out draw")
    parser.add_argument("--byte-steps", type=int, default=default.byte_steps, help="training steps of the byte model")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes("demo")
    check_installed("demo", PACKAGES, "demo")
    options = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    try:
        settings = Settings(**options)
        from ..demo import pipeline

        pipeline.run(settings)
    except ConversionError as error:
        raise CommandError(str(error)) from None
    except TargetError as error:
        raise CommandError(f"demo: --out {error}") from None
    except OSError as error:
        raise CommandError(f"demo: {error}") from None
