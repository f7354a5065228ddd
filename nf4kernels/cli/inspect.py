"""nf4kernels inspect: a table of a model's layers in 4 bits, dense or already quantized."""

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path

from ..quantized_weight import BLOCK_SIZES
from ..stages.compare.variants import CODEBOOKS
from .errors import CommandError, check_cpu_computes
from .meta_model import meta_model


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="a table of each layer's error and scales, of a dense or a 4-bit directory",
        description="Of a dense directory: what quantizing it would make of each linear layer, with the error |Ŵ - W| "
        "/ |W|. Of a 4-bit one (ours, bitsandbytes', or what nf4kernels convert reads): its layers as they are. "
        "zero blocks decode to nothing but zeros; clipped blocks hold a weight beyond their outermost level, as scales "
        "rounded to 8 bits leave it. One layer is in memory at a time; nothing but --plot is written.",
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="a Hugging Face model directory")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="a picture of errors and scales (png, svg, pdf)")
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    dense = parser.add_argument_group("how to quantize a dense directory")
    dense.add_argument("--codebook", choices=CODEBOOKS, default="nf4", help="levels of the 16 codes (default nf4)")
    dense.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, default=None,
        help="weights that share a scale (default: the codebook's own, 64 for nf4)",
    )  # fmt: skip
    dense.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32")
    dense.add_argument("--scale-codebook", choices=("e4m3", "dynamic8"), default="e4m3", help="of 8-bit scales")
    dense.add_argument("--skip", metavar="PATTERN", action="append", default=[], help="leave these layers out")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes("inspect")
    from ..stages.inspect import inspect_directory  # which needs no framework

    if args.plot is not None:
        try:
            from ..stages.plots import check_plot, plot_inspection
        except ImportError as error:
            raise CommandError(f"inspect: --plot needs {error.name}, run: pip install 'nf4kernels[finetune]'") from None
        check_plot(args.plot)
    inspection = inspect_directory(
        args.dir, args.codebook, args.block_size, not args.no_double_quant, args.scale_codebook, args.skip,
        partial(meta_model, verb="inspect"),
    )  # fmt: skip
    if args.plot is not None:
        plot_inspection(args.plot, inspection)
    if args.json:
        print(json.dumps(inspection.as_dict(), indent=2))
        return
    print(inspection)
    kept = Counter(inspection.left_dense.values())
    if kept:
        print("\nleft dense: " + ", ".join(f"{count} {reason}" for reason, count in kept.items()))
    if args.plot is not None:
        print(f"wrote {args.plot}")
