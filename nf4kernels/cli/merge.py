"""nf4kernels merge: a LoRA adapter into its base model, a directory without an adapter."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..quantized_weight import BLOCK_SIZES
from ..storage.directory_checks import ConversionError, Words
from ..storage.merge_adapter import INTO, Merged, Recipe, Survival, merge_adapter
from ..storage.shards import parse_size
from .errors import CommandError, check_cpu_computes, check_installed
from .meta_model import meta_model

WORDS = Words("merge", "--base", "OUT", overwrite="")
MODEL_OF = partial(meta_model, verb="merge")
WORST = 5  # layers in the table


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="a LoRA adapter into its base model",
        description="Write the model that ADAPTER, a directory of PEFT's, was trained for to OUT with the adapter's "
        "products added to its weights: a model that loads without PEFT. The sum is taken in fp32 and rounded "
        "once. One tensor is in memory at a time, or one layer's experts, beside the adapter and the output file being "
        "filled. OUT appears when it is complete, or not at all.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=Path)
    parser.add_argument("out_dir", metavar="OUT", type=Path)
    parser.add_argument(
        "--base", metavar="DIR",
        help="the model's directory; without it the one that the adapter names, also where that is in the cache of "
        "huggingface_hub",
    )  # fmt: skip
    parser.add_argument(
        "--into", choices=INTO, default="base",
        help="base: the 16-bit weights (default). dequantized: the weights as 4 bits have them, decoded to 16 bits, "
        "which is what a QLoRA adapter was trained on. 4bit: 4 bits again, which loses a part of the fine-tuning: how "
        "much is measured first, and needs a yes",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", type=size, default="5GB", help="of an output file (default 5GB)"
    )
    parser.add_argument(
        "--text", metavar="FILE", type=Path,
        help="with --into 4bit, measure the loss on this text first, of the base, with the adapter and merged: a .txt, "
        'or a .jsonl of objects with "text", which the adapter was not trained on',
    )  # fmt: skip
    parser.add_argument("--tokens", metavar="N", type=int, default=2048, help="of --text, at most (default 2048)")
    parser.add_argument("--yes", action="store_true", help="with --into 4bit, go on without asking")
    recipe = parser.add_argument_group("how a 16-bit base is quantized, with --into dequantized or 4bit")
    recipe.add_argument("--codebook", choices=("nf4", "fp4"), default="nf4")
    recipe.add_argument("--block-size", type=int, choices=BLOCK_SIZES[1:], default=64)
    recipe.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32")
    recipe.add_argument("--scale-codebook", choices=("e4m3", "dynamic8"), default="e4m3")
    recipe.add_argument("--skip", metavar="PATTERN", action="append", default=[], help="leave these layers dense")
    parser.set_defaults(func=run)


def size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> None:
    check_cpu_computes("merge")
    from ..stages.base_directory import base_directory

    if args.text is not None and args.into != "4bit":
        raise CommandError(f"merge: --text must be left out but for --into 4bit, got --into {args.into}")
    recipe = Recipe(args.codebook, args.block_size, not args.no_double_quant, args.scale_codebook, tuple(args.skip))
    base = base_directory(args.base, args.adapter)
    measured = args.text is not None
    try:
        merged = merge_adapter(
            args.adapter, base, args.out_dir, args.into, args.max_shard_size, None if recipe == Recipe() else recipe,
            None if measured else lambda survival: _agreed(survival, args.yes),
            _measured_question(args, base) if measured else None, MODEL_OF, words=WORDS,
        )  # fmt: skip
    except ConversionError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"merge: {error}") from error
    _print_summary(merged, base, args)


def _measured_question(args: argparse.Namespace, base: Path) -> Callable[[Survival, Path], bool]:
    """What shows the losses, given the directory that the merge has written, and asks; the text is read now."""
    check_installed("merge", ("transformers", "peft", "accelerate"), "chat")
    from ..stages.merge import loss_of, losses_with_adapter, tokenized_text

    text = tokenized_text(args.text, base, args.adapter, args.tokens)

    def ask(survival: Survival, directory: Path) -> bool:
        alone, adapted = losses_with_adapter(base, args.adapter, text)
        merged = loss_of(directory, text)
        print(f"The loss on {text.tokens} tokens of {args.text}, in nats a token:")
        for what, loss in (("the base alone", alone), ("with the adapter", adapted), ("merged into 4 bits", merged)):
            print(f"  {what:18}  {loss:8.4f}  {loss - adapted:+8.4f}")
        return _agreed(survival, args.yes)

    return ask


def _agreed(survival: Survival, yes: bool) -> bool:
    print(
        "What rounding to 4 bits again does to the fine-tuning: |what is left - what was trained| / |what was trained|"
    )
    worst = sorted(survival.layers.items(), key=lambda layer: -layer[1])
    width = max([len(name) for name, _ in worst[:WORST]] + [len("all measured layers")])
    print(f"  {'all measured layers':{width}}  {survival.error:8.3f}   ({len(worst)} layers)")
    for name, error in worst[:WORST]:
        print(f"  {name:{width}}  {error:8.3f}")
    if survival.unmeasured:
        print(f"  {len(survival.unmeasured)} adapted layers stay dense and keep it whole")
    print("0 keeps the fine-tuning; 1 is as far from it as the base without it. --into base keeps it.", flush=True)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise CommandError(
            "merge: --into 4bit must be agreed to with --yes where no one can be asked; nothing was written"
        )
    return input("Merge into 4 bits? Type yes to go on: ").strip().lower() == "yes"


def _print_summary(merged: Merged, base: Path, args: argparse.Namespace) -> None:
    where = {"base": "the weights", "dequantized": "the decoded 4-bit weights", "4bit": "4 bits"}[args.into]
    parts = [f"{merged.layers} layers"] if merged.layers or not merged.experts else []
    parts += [f"{merged.experts} weights of experts"] if merged.experts else []
    print(f"merged the adapter's {' and '.join(parts)} into {where} of {base}")
    if merged.replaced:
        print(f"replaced as they were trained whole: {', '.join(merged.replaced)}")
    if merged.untied:
        print(f"no longer tied to the input embeddings: {', '.join(merged.untied)}")
    if merged.tokenizer:
        print(f"from the adapter, not from its base: {', '.join(merged.tokenizer)}")
    written = sum(file.stat().st_size for file in args.out_dir.glob("*.safetensors"))
    print(f"wrote {args.out_dir}: {written / 2**20:.1f} MiB")
