"""nf4kernels compare: what each 4-bit data type costs a model on a text."""

import argparse
import json
from pathlib import Path

from ..quantized_weight import BLOCK_SIZES
from .errors import CommandError, check_cpu_computes

CODEBOOKS = ("nf4", "fp4", "int4", "af4", "mxfp4", "nvfp4")
SCALES = ("e4m3", "dynamic8", "float32")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="loss, KL and agreement of 4-bit data types, on your model and text",
        description="Quantizes the dense model in MODEL in each way asked for and runs it on a text: held-out loss in "
        "nats a token, KL to the dense model, and how often both find the same token likeliest. The text must be one "
        "that the model was not trained on. Every codebook is tried with every block size and every kind of scale; "
        "mxfp4 and nvfp4 have their own and come once.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a dense Hugging Face directory with its tokenizer")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, required=True,
        help="a plain text file, or .jsonl with a document in each line's `text`",
    )  # fmt: skip
    parser.add_argument(
        "--codebooks", nargs="+", choices=CODEBOOKS, default=list(CODEBOOKS), metavar="NAME",
        help=f"of {', '.join(CODEBOOKS)} (default all)",
    )  # fmt: skip
    parser.add_argument(
        "--block-sizes", nargs="+", type=int, choices=BLOCK_SIZES, default=[64], metavar="N",
        help=f"weights that share a scale: of {', '.join(map(str, BLOCK_SIZES))} (default 64)",
    )  # fmt: skip
    parser.add_argument(
        "--scales", nargs="+", choices=SCALES, default=["e4m3", "float32"], metavar="KIND",
        help="e4m3 or dynamic8: double quantization with that 8-bit codebook; float32: without (default e4m3 float32)",
    )  # fmt: skip
    parser.add_argument("--no-double-quant", action="store_true", help="the same as --scales float32")
    parser.add_argument("--all", action="store_true", help="every codebook, block size and kind of scale: 110 variants")
    parser.add_argument("--tokens", type=int, default=2048, help="predict this many tokens of the text (default 2048)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default 512)")
    parser.add_argument("--skip", metavar="PATTERN", action="append", default=[], help="leave these layers dense")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="bits a weight against KL (png, svg, pdf)")
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes("compare")
    try:
        from ..stages.compare import text as compare
        from ..stages.compare.variants import variants

        if args.plot is not None:
            from ..stages.plots import check_plot, plot_comparison
    except ImportError as error:
        raise CommandError(
            f"compare: {error.name} must be installed, run: pip install 'nf4kernels[finetune]'"
        ) from None
    if args.plot is not None:
        check_plot(args.plot)
    scales = ["float32"] if args.no_double_quant else args.scales
    wanted = (CODEBOOKS, BLOCK_SIZES, SCALES) if args.all else (args.codebooks, args.block_sizes, scales)
    compared = variants(*wanted)
    comparison = compare.compare_directory(
        args.model, args.text, compared, args.tokens, args.length, args.skip, args.device
    )
    if args.plot is not None:
        plot_comparison(args.plot, comparison)
    if args.json:
        print(json.dumps({"model": str(args.model), "text": str(args.text)} | comparison.as_dict(), indent=2))
        return
    if comparison.tokens < args.tokens:
        print(f"note: the text has {comparison.tokens} tokens to predict, fewer than --tokens {args.tokens}")
    print(
        f"{args.model} on {comparison.tokens} tokens of {args.text}; {comparison.layers} layers,"
        f" {comparison.weights / 1e6:.1f} M weights in 4 bits\n\n{comparison}"
    )
    if args.plot is not None:
        print(f"wrote {args.plot}")
