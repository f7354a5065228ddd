"""nf4kernels compare: what each data type costs a model, on a text, on tasks, and after LoRA."""

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..quantized_weight import BLOCK_SIZES
from ..stages.compare.variants import CODEBOOKS, SCALES, variants
from .errors import CommandError, check_cpu_computes, check_installed
from .fields import keep_other_flags

SCALES_OF_TEXT = ("e4m3", "float32")
TUNED = ("nf4", "fp4", "int4")
NEEDED = ("transformers",)
NEEDED_TO_TUNE = ("transformers", "peft", "accelerate", "trl", "datasets", "matplotlib", "yaml")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="loss, KL and agreement of the data types, on your model and text",
        usage="nf4kernels compare MODEL [--text FILE] [--tasks NAME ...] [--finetune DATA ... --output DIR] [options]",
        description="Quantizes the dense model in MODEL in each way asked for and measures what that costs. --text "
        "runs it on a text: held-out loss in nats a token, KL to the dense model, and how often both find the same "
        "token likeliest. --tasks runs lm-evaluation-harness on it. --finetune trains LoRA on the dense weights and on "
        "each way's, with the same examples, seeds and recipe, and compares the held-out losses. Every codebook is "
        "tried with every block size and every kind of scale; mxfp4 and nvfp4 have their own and come once.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a dense Hugging Face directory with its tokenizer")
    _add_variants(parser)
    parser.add_argument("--skip", metavar="PATTERN", action="append", default=[], help="leave these layers dense")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    _add_text(parser.add_argument_group("on a text"))
    _add_tasks(parser.add_argument_group("on tasks of lm-evaluation-harness"))
    _add_finetune(parser.add_argument_group("after LoRA", "Every field of nf4kernels finetune may follow as a flag."))
    keep_other_flags(parser)
    parser.set_defaults(func=run)


def _add_variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codebooks", nargs="+", choices=CODEBOOKS, metavar="NAME",
        help=f"of {', '.join(CODEBOOKS)} (default all; of --finetune {', '.join(TUNED)})",
    )  # fmt: skip
    parser.add_argument(
        "--block-sizes", nargs="+", type=int, choices=BLOCK_SIZES, metavar="N",
        help=f"weights that share a scale: of {', '.join(map(str, BLOCK_SIZES))} (default 64; of --finetune the "
        "recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--scales", nargs="+", choices=SCALES, metavar="KIND",
        help="e4m3 or dynamic8: double quantization with that 8-bit codebook; float32: without (default "
        f"{' '.join(SCALES_OF_TEXT)}; of --finetune the recipe's)",
    )  # fmt: skip
    parser.add_argument("--no-double-quant", action="store_true", help="the same as --scales float32")
    parser.add_argument("--all", action="store_true", help="every codebook, block size and kind of scale: 137 variants")


def _add_text(group: Any) -> None:
    group.add_argument(
        "--text", metavar="FILE", type=Path,
        help="a plain text file, or .jsonl with a document in each line's `text`; one the model was not trained on",
    )  # fmt: skip
    group.add_argument("--tokens", type=int, default=2048, help="predict this many tokens of the text (default 2048)")
    group.add_argument("--length", type=int, default=512, help="tokens of a window (default 512)")
    group.add_argument("--plot", metavar="FILE.png", type=Path, help="bits a weight against KL (png, svg, pdf)")


def _add_tasks(group: Any) -> None:
    group.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks, groups or tags; pip install lm_eval")
    group.add_argument("--tasks-path", metavar="DIR", type=Path, help="a directory of task YAML files of your own")
    group.add_argument("--tasks-limit", metavar="N", type=int, help="the first N examples of each task (default all)")
    group.add_argument("--tasks-fewshot", metavar="N", type=int, help="solved examples first (default: the task's)")


def _add_finetune(group: Any) -> None:
    group.add_argument(
        "--finetune", nargs="+", metavar="DATA", type=Path, help="files of examples, as of nf4kernels finetune"
    )
    group.add_argument(
        "--output", metavar="DIR", type=Path,
        help="for the runs, compare.json and losses.png; the same command goes on where it was stopped",
    )  # fmt: skip
    group.add_argument("--seeds", nargs="+", type=int, metavar="N", default=[0, 1, 2], help="(default 0 1 2)")
    group.add_argument("--config", metavar="RECIPE.yaml", type=Path, help="lines FIELD: VALUE, as of finetune")


def run(args: argparse.Namespace) -> None:
    _check(args)
    check_cpu_computes("compare")
    if args.finetune:
        check_installed("compare", NEEDED_TO_TUNE, "finetune")
    check_installed("compare", NEEDED, "finetune")
    if args.tasks:
        try:
            check_installed("compare", ["lm_eval"], "finetune")
        except CommandError:
            raise CommandError("compare: lm_eval must be installed for --tasks, run: pip install lm_eval") from None
    if args.plot is not None:
        check_installed("compare", ["matplotlib"], "finetune")
        from ..stages.plots import check_plot

        check_plot(args.plot)
    result: dict[str, Any] = {"model": str(args.model)}
    between = ""
    for wanted, part in ((args.text, _on_text), (args.tasks, _on_tasks), (args.finetune, _after_lora)):
        if wanted:
            made, text = part(args)
            result |= made
            if not args.json:  # each when it is there: the next may take hours
                print(between + text, flush=True)
                between = "\n"
    if args.json:
        print(json.dumps(result, indent=2))


def _check(args: argparse.Namespace) -> None:
    """CommandError for what one flag asks of another."""
    if not (args.text or args.tasks or args.finetune):
        raise CommandError("compare: --text FILE, --tasks NAME or --finetune DATA must be given, got none")
    for name, wanted, needs in (
        ("--plot", args.plot, "text"), ("--tasks-path", args.tasks_path, "tasks"),
        ("--tasks-limit", args.tasks_limit, "tasks"), ("--tasks-fewshot", args.tasks_fewshot, "tasks"),
        ("--output", args.output, "finetune"), ("--config", args.config, "finetune"),
        (next(iter(args.fields), ""), args.fields or None, "finetune"),
    ):  # fmt: skip
        if wanted is not None and not getattr(args, needs):
            raise CommandError(f"compare: {name} must come with --{needs}, or be left out")
    if args.finetune and args.output is None:
        raise CommandError("compare: --output must be a directory to write, for --finetune, got none")
    if args.finetune and args.device not in (None, "cpu", "cuda"):
        raise CommandError(
            f"compare: --device must be cpu or cuda with --finetune, got {args.device} (CUDA_VISIBLE_DEVICES picks one)"
        )


def _scales(args: argparse.Namespace) -> list[str] | None:
    return ["float32"] if args.no_double_quant else args.scales


def _compared(args: argparse.Namespace) -> list[Any]:
    """The variants of --text and --tasks."""
    if args.all:
        return variants(CODEBOOKS, BLOCK_SIZES, SCALES)
    return variants(args.codebooks or CODEBOOKS, args.block_sizes or [64], _scales(args) or SCALES_OF_TEXT)


def _on_text(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..stages.compare.text import compare_directory

    comparison = compare_directory(
        args.model, args.text, _compared(args), args.tokens, args.length, args.skip, args.device
    )
    text = (
        f"{args.model} on {comparison.tokens} tokens of {args.text}; {comparison.layers} layers,"
        f" {comparison.weights / 1e6:.1f} M weights in 4 bits\n\n{comparison}"
    )
    if comparison.tokens < args.tokens:
        text = f"note: the text has {comparison.tokens} tokens to predict, fewer than --tokens {args.tokens}\n{text}"
    if args.plot is not None:
        from ..stages.plots import plot_comparison

        plot_comparison(args.plot, comparison)
        text += f"\nwrote {args.plot}"
    return {"text": str(args.text)} | comparison.as_dict(), text


def _on_tasks(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..stages.compare.tasks import compare_tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns at every model that is loaded already
    comparison = compare_tasks(
        args.model, args.tasks, _compared(args), args.tasks_path, args.tasks_limit, args.tasks_fewshot, args.skip,
        args.device,
    )  # fmt: skip
    limit = "" if comparison.limit is None else f", the first {comparison.limit} examples of each"
    return {"tasks": comparison.as_dict()}, f"{args.model} on tasks{limit}\n\n{comparison}"


def _after_lora(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..stages.compare.dense import open_device
    from ..stages.compare.finetunes import compare_finetunes
    from ..stages.plots import plot_finetunes

    names: Iterable[str] = CODEBOOKS if args.all else args.codebooks or TUNED
    sizes, scales = (BLOCK_SIZES, SCALES) if args.all else (args.block_sizes, _scales(args))
    fields = list(args.fields)
    if args.skip:
        fields += ["--skip", *args.skip]
    if args.device is not None:
        open_device(args.device)
    if args.device == "cpu":
        fields += ["--use_cpu=true"]
    try:
        comparison = compare_finetunes(
            args.model, args.finetune, args.output, list(names), sizes, scales, args.seeds, args.config, fields
        )
    except KeyboardInterrupt:
        print("\nthe same command goes on where it was", file=sys.stderr)
        raise
    picture = args.output / "losses.png"
    plot_finetunes(picture, comparison)
    seeds = ", ".join(map(str, comparison.seeds))
    return {"finetune": comparison.as_dict()}, (
        f"LoRA on {args.model}: {comparison.examples} examples, {comparison.tokens} tokens; loss of"
        f" {comparison.held_out} held-out examples, nats a token; means over seeds {seeds}, std of the sample;\nover"
        f" dense: against the dense weights with the same seed, which like all that is not in 4 bits compute in"
        f" {comparison.dtype}\n\n{comparison}\nwrote {picture}"
    )
