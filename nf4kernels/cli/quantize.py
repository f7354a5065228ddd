"""nf4kernels quantize: a Hugging Face safetensors directory to 4 bits, in bitsandbytes' format."""

import argparse
from collections import Counter
from pathlib import Path

import torch

from ..quantized_weight import BLOCK_SIZES, INT8
from ..stages.plan_file import read_plan
from ..storage.convert import SKIP, Conversion, convert_directory
from ..storage.directory_checks import ConversionError, Words
from .errors import CommandError, check_cpu_computes
from .meta_model import meta_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LISTED = 5  # names in a line
WORDS = Words("quantize", "IN_DIR", "OUT_DIR", "--skip", "--overwrite", "--plan")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="a Hugging Face safetensors directory to 4 bits",
        description="Write the model in IN_DIR to OUT_DIR with its linear layers in 4 bits, in bitsandbytes' format: "
        "transformers with bitsandbytes loads it, and so do nf4kernels.load_checkpoint and transformers with "
        "nf4kernels.integrations.transformers; with experts in 4 bits, or in int8, only the latter two. One dense "
        "tensor is in memory at a time, or one layer's experts, beside the output file being filled. OUT_DIR appears "
        "when it is complete, or not at all.",
    )
    parser.add_argument("in_dir", metavar="IN_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument(
        "--codebook", choices=("nf4", "fp4", INT8), default="nf4",
        help="int8: 8 bits a weight, in a format that bitsandbytes does not have",
    )  # fmt: skip
    parser.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES[1:], default=64, help="weights that share a scale (default 64)"
    )
    parser.add_argument(
        "--no-double-quant", action="store_true", help="keep the scales in fp32 (4.5 bits a weight; int8 8.5)"
    )
    parser.add_argument("--scale-codebook", choices=("e4m3", "dynamic8"), default="e4m3")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="of the tensors that stay dense and of the layers' arithmetic; auto keeps what is stored",
    )  # fmt: skip
    parser.add_argument(
        "--skip", metavar="PATTERN", action="append", default=[],
        help=f"leave these layers dense: a name, a part of it, or a pattern; adds to {', '.join(SKIP)}",
    )  # fmt: skip
    parser.add_argument(
        "--plan", metavar="PLAN.json", type=Path,
        help="of nf4kernels recover plan: options layer by layer; the flags above are for what it does not name",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it holds a model")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes("quantize")
    plan = read_plan(args.plan)
    try:
        conversion = convert_directory(
            args.in_dir, args.out_dir, args.codebook, args.block_size, not args.no_double_quant, args.scale_codebook,
            DTYPES.get(args.dtype), args.skip, args.overwrite, model_of=meta_model, words=WORDS, plan=plan,
        )  # fmt: skip
    except ConversionError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"quantize: {error}") from error
    _print_summary(conversion, args)


def _print_summary(conversion: Conversion, args: argparse.Namespace) -> None:
    choice, uneven, report = conversion.choice, conversion.uneven, conversion.report
    print(report.summary().split("\n\n")[0])
    kept = ", ".join(f"{count} {reason}" for reason, count in Counter(choice.reasons.values()).items())
    print(f"\nlayers chosen by {choice.source}" + (f"; kept dense: {kept}" if kept else ""))
    if choice.unknown:
        print(f"not a module of {choice.source}, left as in the file: {_listed(choice.unknown)}")
    if uneven and args.codebook != INT8:
        print(
            f"note: in {len(uneven)} layers ({uneven[0]}, ...) a row is not a whole number of blocks of "
            f"{args.block_size}; bitsandbytes 0.50 decodes these wrongly on CPUs with AVX-512, nf4kernels does not"
        )
    if args.codebook == INT8 or args.plan is not None:
        what = "has no such 8-bit format" if args.plan is None else "does not read a plan"
        print(
            f"note: bitsandbytes {what}: nf4kernels.load_checkpoint loads the result, and so does"
            " transformers with nf4kernels.integrations.transformers"
        )
    elif conversion.experts:
        print(
            "note: bitsandbytes has no format for the experts in 4 bits: nf4kernels.load_checkpoint loads the result,"
            " and so does transformers with nf4kernels.integrations.transformers"
        )
    dense = report.model_bytes_after - report.bytes_after
    share = dense / max(report.model_bytes_after, 1)
    if share > 0.5:
        largest = sorted(report.skipped, key=lambda layer: -layer.bytes)
        names = _listed([layer.name.removesuffix(".weight") for layer in largest])
        print(f"note: most of the bytes stay dense, in {names}")
    print(f"wrote {args.out_dir}: {report.model_bytes_after / 2**20:.1f} MiB, {100 * share:.0f} % of it dense")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
