"""nf4kernels convert: a model that others publish in 4 bits to a directory of ours, and MXFP4 back."""

import argparse
from functools import partial
from pathlib import Path

from ..storage.convert import ConversionError, Words
from ..storage.convert_published import Published, convert_published, convert_to_mxfp4
from ..storage.published.opening import is_gguf
from .errors import CommandError
from .meta_model import gguf_config, meta_model, save_gguf_tokenizer

WORDS = Words("convert", "SRC", "DST", "", "--overwrite")
MODEL_OF = partial(meta_model, verb="convert")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="a model published in 4 bits (MXFP4, NVFP4, INT4, GGUF) to this package's files, losslessly",
        description="Write the model in SRC to DST with its codes and scales unchanged. SRC is a Hugging Face model "
        "that is published in 4 bits (gpt-oss's MXFP4; NVFP4 of modelopt or compressed-tensors; symmetric INT4 of "
        "compressed-tensors, GPTQ or AutoRound) or a GGUF file (Q4_0, IQ4_NL). nf4kernels.load_checkpoint loads the "
        "result, and so does transformers with nf4kernels.integrations.transformers. One weight is in memory at a "
        "time, or one layer's experts, beside the output file being filled. DST appears when it is complete, or not "
        "at all.",
    )
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("out_dir", metavar="DST", type=Path)
    parser.add_argument(
        "--to", choices=("nf4kernels", "mxfp4"), default="nf4kernels",
        help="mxfp4: SRC is a directory of ours in MXFP4, which is written as it was published, byte for byte",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it holds a model")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    try:
        if args.to == "mxfp4":
            done = convert_to_mxfp4(args.source, args.out_dir, args.overwrite, words=WORDS)
        else:
            from_gguf = is_gguf(args.source)
            config = gguf_config(args.source) if from_gguf else None
            done = convert_published(args.source, args.out_dir, MODEL_OF, config, args.overwrite, words=WORDS)
            if from_gguf:
                save_gguf_tokenizer(args.source, args.out_dir)
    except ConversionError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"convert: {error}") from error
    _print_summary(done, args)


def _print_summary(done: Published, args: argparse.Namespace) -> None:
    print(f"{done.weights} weights in {done.codebook}, none of them changed")
    if done.ignored:
        print(f"left out: {len(done.ignored)} scales of activations ({done.ignored[0]}, ...), which stay in 16 bits")
    print(f"wrote {args.out_dir}: {done.nbytes / 2**20:.1f} MiB")
