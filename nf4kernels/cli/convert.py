"""nf4kernels convert: a directory of others to one of ours, or back; no weight changes."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..storage.convert_bitsandbytes import convert_bitsandbytes, convert_to_bitsandbytes
from ..storage.convert_published import convert_published, convert_to_mxfp4
from ..storage.directory_checks import ConversionError, Words, read_model_config
from ..storage.export_directory import export_adapter, export_dense
from ..storage.model_directory import has_bin_files, is_of_bitsandbytes
from ..storage.peft_format import CONFIG
from ..storage.published.opening import is_gguf
from .errors import CommandError
from .meta_model import gguf_config, meta_model, save_gguf_tokenizer

WORDS = Words("convert", "SRC", "DST", "", "--overwrite")
MODEL_OF = partial(meta_model, verb="convert")
TO = ("nf4kernels", "bitsandbytes", "mxfp4")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="a model in 4 bits of others (bitsandbytes, MXFP4, NVFP4, INT4, GGUF) to this package's files, losslessly",
        description="Write the model in SRC to DST with its codes and scales unchanged. SRC is a Hugging Face model "
        "that transformers saved with bitsandbytes in 4 bits, or one that is published in 4 bits (gpt-oss's MXFP4; "
        "NVFP4 of modelopt or compressed-tensors; symmetric INT4 of compressed-tensors, GPTQ or AutoRound), or a GGUF "
        "file (Q4_0, IQ4_NL). nf4kernels.load_checkpoint loads the result, and so does transformers with "
        "nf4kernels.integrations.transformers. One weight is in memory at a time, or one layer's experts, beside the "
        "output file being filled. SRC may also be an adapter of PEFT's or a dense model that has its tensors in .bin "
        "files, which are written in safetensors. DST appears when it is complete, or not at all.",
    )
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("out_dir", metavar="DST", type=Path)
    parser.add_argument(
        "--to", choices=TO, default="nf4kernels",
        help="bitsandbytes: SRC is a directory of ours in NF4 or FP4, which transformers then loads with bitsandbytes. "
        "mxfp4: SRC is one of ours in MXFP4, which is written as it was published, byte for byte",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it holds a model")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    is_adapter = (args.source / CONFIG).is_file()
    if is_adapter and (args.overwrite or args.to != "nf4kernels"):
        raise CommandError("convert: SRC must be a model with --to or --overwrite, got an adapter")
    try:
        if is_adapter:
            count = export_adapter(args.source, args.out_dir, replace(WORDS, overwrite=""))
            print(f"{count} tensors in safetensors, none of them changed\nwrote {args.out_dir}")
        else:
            _convert_model(args)
    except ConversionError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"convert: {error}") from error


def _convert_model(args: argparse.Namespace) -> None:
    places, overwrite = (args.source, args.out_dir), args.overwrite
    if args.to == "mxfp4":
        done = convert_to_mxfp4(*places, overwrite, words=WORDS)
    elif args.to == "bitsandbytes":
        done = convert_to_bitsandbytes(*places, MODEL_OF, overwrite, words=WORDS)
    elif is_gguf(args.source):
        done = convert_published(*places, MODEL_OF, gguf_config(args.source), overwrite, words=WORDS)
        save_gguf_tokenizer(*places)
    else:
        config = read_model_config(args.source, WORDS)
        if not config.get("quantization_config") and has_bin_files(args.source):
            nbytes = export_dense(*places, overwrite=overwrite, words=WORDS)
            print(f"wrote {args.out_dir}: {nbytes / 2**20:.1f} MiB in safetensors, no tensor changed")
            return
        if is_of_bitsandbytes(config):
            done = convert_bitsandbytes(*places, MODEL_OF, overwrite, words=WORDS)
        else:
            done = convert_published(*places, MODEL_OF, None, overwrite, words=WORDS)
    print(f"{done.weights} weights in {done.codebook}, none of them changed")
    if done.ignored:
        print(f"left out: {len(done.ignored)} scales of activations ({done.ignored[0]}, ...), which stay in 16 bits")
    print(f"wrote {args.out_dir}: {done.nbytes / 2**20:.1f} MiB")
