"""nf4kernels recover round: to 4 bits by calibration on a text, with the bytes of plain rounding."""

import argparse
from pathlib import Path

from ...quantized_weight import BLOCK_SIZES
from ..errors import check_cpu_computes, check_installed

VERB = "recover round"
NEEDED = ("transformers",)
METHODS = ("gptq", "awq", "awq+gptq", "search", "levels", "gptq+levels", "lq-lora", "lq-lora+gptq")


def add_parser(actions) -> None:
    parser = actions.add_parser(
        "round",
        help="a model to 4 bits by calibration on a text, with less lost in the same bytes",
        description="Quantize the dense model in IN_DIR with levels chosen by how the model reads --text, and write "
        "it to OUT_DIR, where it has as many bytes as nf4kernels quantize would write. gptq makes up for each column's "
        "error in the columns after it; awq scales columns that large inputs meet; search looks for block scales; "
        "levels fits each layer 16 levels of its own; lq-lora starts a LoRA adapter from the rounding error and writes "
        "it to OUT_DIR/adapter, for nf4kernels finetune --adapter. The text should be of the kind that the model is "
        "for: several files are read in equal parts. The whole dense model is in memory, three times with --held-out. "
        "OUT_DIR appears when it is complete, or not at all.",
    )
    parser.add_argument("in_dir", metavar="IN_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument(
        "--text", metavar="FILE", type=Path, nargs="+", required=True, help=".txt, or .jsonl with a text in each line"
    )
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--tokens", type=int, default=16384, help="of text to calibrate on (default 16384)")
    parser.add_argument("--length", type=int, default=128, help="tokens that are read together (default 128)")
    parser.add_argument("--codebook", choices=("nf4", "fp4", "int4", "af4"), default="nf4")
    parser.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES[1:], default=64, help="weights that share a scale (default 64)"
    )
    parser.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32 (4.5 bits a weight)")
    parser.add_argument("--scale-codebook", choices=("e4m3", "dynamic8"), default="e4m3")
    parser.add_argument(
        "--skip", metavar="PATTERN", action="append", default=[],
        help="leave these layers dense: a name, a part of it, or a pattern",
    )  # fmt: skip
    parser.add_argument(
        "--plan", metavar="PLAN.json", type=Path,
        help="of nf4kernels recover plan: options layer by layer; the flags above are for what it does not name",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, default=16, help="of lq-lora's adapter (default 16)")
    parser.add_argument("--alpha", type=float, default=32.0, help="of lq-lora's adapter (default 32)")
    parser.add_argument(
        "--held-out", metavar="FILE", type=Path,
        help="another text, to measure loss, KL and agreement on, beside 16 bits and plain rounding",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it holds a model")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes(VERB)
    check_installed(VERB, NEEDED, "finetune")
    from ...stages.recover.round import ADAPTER, WITH_ADAPTER, RoundOptions, round_directory

    options = RoundOptions(
        args.method, args.text, args.tokens, args.length, args.codebook, args.block_size, not args.no_double_quant,
        args.scale_codebook, args.skip, args.plan, args.rank, args.alpha, args.held_out, args.overwrite,
    )  # fmt: skip
    rounded = round_directory(args.in_dir, args.out_dir, options)
    print(rounded)
    adapter = f" and, with which the error above is, {args.out_dir / ADAPTER}" if args.method in WITH_ADAPTER else ""
    print(f"\nwrote {args.out_dir}: {rounded.report.model_bytes_after / 2**20:.1f} MiB{adapter}")
