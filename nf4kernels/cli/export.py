"""nf4kernels export: a model or adapter directory in the layouts that other programs read."""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from ..storage.convert import convert_directory
from ..storage.convert_bitsandbytes import convert_to_bitsandbytes
from ..storage.directory_checks import ConversionError, Words, read_model_config
from ..storage.export_directory import export_adapter, export_dense
from ..storage.llama_cpp import convert_to_gguf, find_converter
from ..storage.model_directory import quantization_of
from ..storage.peft_format import CONFIG
from .errors import CommandError, check_cpu_computes
from .merge import size
from .meta_model import meta_model

WORDS = Words("export", "DIR", "OUT", overwrite="")
MODEL_OF = partial(meta_model, verb="export")
TO = ("safetensors", "bitsandbytes", "gguf", "peft")
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="a model or an adapter for other programs: safetensors, bitsandbytes, GGUF, PEFT",
        description="Write the model in DIR, dense or in 4 bits, to OUT. safetensors: 16-bit files, 4-bit weights "
        "decoded. bitsandbytes: 4 bits as transformers loads them with bitsandbytes; a dense model is quantized. gguf: "
        "one file, by llama.cpp's own converter, which must be installed. peft: DIR is an adapter, whose tensors are "
        "written in safetensors where an old one has them in .bin. An adapter becomes a model by nf4kernels merge. OUT "
        "appears when it is complete, or not at all.",
    )
    parser.add_argument("source", metavar="DIR", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--to", choices=TO, required=True)
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", type=size, default="5GB",
        help="of an output file (default 5GB); a dense model that is quantized keeps its own files",
    )  # fmt: skip
    parser.add_argument("--llama-cpp", metavar="DIR", type=Path, help="with convert_hf_to_gguf.py, if not on PATH")
    parser.add_argument("--outtype", choices=OUTTYPES, default="auto", help="of the weights in a GGUF file")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes("export")
    is_adapter = (args.source / CONFIG).is_file()
    if is_adapter and args.to != "peft":
        raise CommandError(
            f"export: DIR must be a model with --to {args.to}, got an adapter: nf4kernels merge it first"
        )
    try:
        if args.to == "peft":
            export_adapter(args.source, args.out, WORDS)
        elif args.to == "safetensors":
            export_dense(args.source, args.out, MODEL_OF, args.max_shard_size, words=WORDS)
        elif args.to == "gguf":
            _to_gguf(args)
        elif quantization_of(read_model_config(args.source, WORDS), WORDS) is None:
            convert_directory(args.source, args.out, model_of=MODEL_OF, words=WORDS)
        else:
            convert_to_bitsandbytes(args.source, args.out, MODEL_OF, max_shard_size=args.max_shard_size, words=WORDS)
    except ConversionError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"export: {error}") from error
    files = [args.out] if args.out.is_file() else args.out.glob("*.safetensors")
    print(f"wrote {args.out}: {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")


def _to_gguf(args: argparse.Namespace) -> None:
    """A 4-bit model is decoded to a directory beside OUT first: the converter reads dense ones."""
    if args.out.exists():
        raise CommandError(f"export: OUT must not exist, got {args.out}")
    if not args.out.parent.is_dir():
        raise CommandError(f"export: OUT must be a file in a directory that exists, got {args.out}")
    try:
        script = find_converter(args.llama_cpp, "export")
        if quantization_of(read_model_config(args.source, WORDS), WORDS) is None:
            convert_to_gguf(script, args.source.resolve(), args.out.resolve(), args.outtype, "export")
            return
        with tempfile.TemporaryDirectory(dir=args.out.resolve().parent, prefix=".nf4kernels-export-") as directory:
            dense = Path(directory) / args.source.resolve().name
            export_dense(args.source, dense, MODEL_OF, args.max_shard_size, words=WORDS)
            convert_to_gguf(script, dense, args.out.resolve(), args.outtype, "export")
    except ConversionError:
        raise
    except ValueError as error:
        raise CommandError(str(error)) from None
