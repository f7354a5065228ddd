"""nf4kernels quantize: a Hugging Face safetensors directory to 4 bits, in bitsandbytes' format."""

import argparse
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..functional import quantize
from ..model.plan import skips
from ..model.quantize import squared_error
from ..model.report import QuantizedLayer, QuantizeReport, SkippedLayer
from ..quantized_weight import BLOCK_SIZES, WEIGHT_DTYPES
from ..storage.atomic import TargetError, copy_file, replacing_directory, write_json
from ..storage.checkpoint import checkpoint_files, weight_to_tensors, write_tensors
from .errors import CommandError
from .linear_layers import Choice, choose

INDEX = "model.safetensors.index.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Beside what the model itself says: parts whose rounding costs more than their bytes are worth.
SKIP = ("lm_head", "embed_out", "router", "*.gate", "score", "classifier")
OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".index.json",
)  # fmt: skip


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a shard, as its header has it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: not one that can be quantized


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="a Hugging Face safetensors directory to 4 bits",
        description="Write the model in IN_DIR to OUT_DIR with its linear layers in 4 bits, in bitsandbytes' format: "
        "transformers with bitsandbytes loads it, and so does nf4kernels.load_checkpoint. One dense tensor is in "
        "memory at a time, beside the output file being filled. OUT_DIR appears when it is complete, or not at all.",
    )
    parser.add_argument("in_dir", metavar="IN_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--codebook", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, default=64, help="weights that share a scale (default 64)"
    )
    parser.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32 (4.5 bits a weight)")
    parser.add_argument("--scale-codebook", choices=("e4m3", "dynamic8"), default="e4m3")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="of the tensors that stay dense and of the layers' arithmetic; auto keeps what is stored",
    )  # fmt: skip
    parser.add_argument(
        "--skip", metavar="PATTERN", action="append", default=[],
        help=f"leave these layers dense: a name, a part of it, or a pattern; adds to {', '.join(SKIP)}",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it holds a model")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    in_dir, out_dir = args.in_dir.resolve(), args.out_dir.resolve()
    config = _read_config(in_dir)
    if in_dir == out_dir or in_dir in out_dir.parents or out_dir in in_dir.parents:
        raise CommandError(f"quantize: OUT_DIR must be outside IN_DIR, and IN_DIR outside OUT_DIR, got {args.out_dir}")
    shards = _read_headers(in_dir)
    tensors = [tensor for shard in shards.values() for tensor in shard]
    matrices = {t.name.removesuffix(".weight"): t for t in tensors if t.name.endswith(".weight") and len(t.shape) == 2}
    for pattern in args.skip:
        if not any(skips(pattern, name) for name in matrices):
            raise CommandError(f"quantize: --skip must match a layer, got {pattern!r}")
    choice = choose(in_dir, config, matrices, (*SKIP, *args.skip))
    quantized = {name: matrices[name] for name in choice.layers if matrices[name].dtype in WEIGHT_DTYPES}
    if not quantized:
        raise CommandError(f"quantize: {args.in_dir} must have a linear layer to quantize, got none ({choice.source})")
    dense = [name for name in choice.layers if name not in quantized]
    new_config = _new_config(config, args, quantized, [*choice.dense, *dense])

    _check_target(out_dir, args.overwrite)
    try:
        with replacing_directory(out_dir) as staging:
            report = _convert(in_dir, staging, shards, quantized, args)
            write_json(staging / "config.json", new_config)
            _copy_rest(in_dir, staging)
    except TargetError as error:
        raise CommandError(f"OUT_DIR {error}") from None
    except OSError as error:
        raise CommandError(f"quantize: {error}") from error
    _print_summary(report, choice, quantized, args)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise CommandError(f"OUT_DIR must not exist (or say --overwrite), got {target}")
    weights = any(target.glob("*.safetensors")) if target.is_dir() else False
    if not weights or not (target / "config.json").is_file():
        raise CommandError(f"OUT_DIR must be a model directory to be overwritten, got {target} without model files")


def _read_config(in_dir: Path) -> dict:
    file = in_dir / "config.json"
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise CommandError(f"quantize: IN_DIR must be a Hugging Face model directory, got {error}") from None
    except ValueError as error:
        raise CommandError(f"quantize: {file} must hold JSON, got {error}") from None
    if not isinstance(config, dict):
        raise CommandError(f"quantize: {file} must hold a JSON object, got {type(config).__name__}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise CommandError(f"quantize: IN_DIR must hold a dense model, got one quantized by {method}")
    return config


def _read_headers(in_dir: Path) -> dict[str, list[_Tensor]]:
    """file name -> its tensors; every file is opened, so that a damaged one ends the run before anything is written."""
    try:
        files = checkpoint_files(in_dir, "quantize")
    except ValueError as error:
        raise CommandError(str(error)) from None
    shards = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                slices = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118
                shards[file.name] = [
                    _Tensor(name, tuple(s.get_shape()), STORED.get(str(s.get_dtype()))) for name, s in slices
                ]
        except (SafetensorError, OSError) as error:
            raise CommandError(f"quantize: {file} must be a whole safetensors file, got {error}") from None
    index = in_dir / INDEX
    if index.exists():
        listed = json.loads(index.read_text())["weight_map"]
        found = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        for name in sorted(listed.keys() ^ found.keys()):
            raise CommandError(
                f"quantize: {INDEX} must list the tensors of its files, {name} is in one of the two only"
            )
    return shards


def _new_config(config: dict, args: argparse.Namespace, quantized: dict[str, _Tensor], dense: list[str]) -> dict:
    """config.json with what transformers needs to load the result through bitsandbytes."""
    config = dict(config)
    if args.dtype != "auto":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = args.dtype
    stored = Counter(tensor.dtype for tensor in quantized.values()).most_common(1)[0][0]
    compute = config.get("dtype") or config.get("torch_dtype") or str(stored).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": args.codebook,
        "bnb_4bit_use_double_quant": not args.no_double_quant,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(set(dense)),
    }
    return config


def _convert(in_dir: Path, staging: Path, shards, quantized, args: argparse.Namespace) -> QuantizeReport:
    """Write every shard, and the index where there was one."""
    layers, skipped, weight_map = [], [], {}
    before = after = 0
    with tqdm(total=sum(map(len, shards.values())), desc="quantize", unit="tensor") as bar:
        for file, tensors in shards.items():
            out = {}
            with safe_open(in_dir / file, framework="pt") as opened:
                for header in tensors:
                    tensor = opened.get_tensor(header.name)
                    before += tensor.nbytes
                    layer = header.name.removesuffix(".weight")
                    if quantized.get(layer) is header:
                        parts, line = _quantize_tensor(tensor, layer, args)
                        out.update(parts)
                        layers.append(line)
                    else:
                        out[header.name] = _dense(tensor, args.dtype)
                        if tensor.dim() >= 2:
                            skipped.append(SkippedLayer(header.name, tuple(tensor.shape), tensor.nbytes, "kept"))
                    bar.update()
                metadata = opened.metadata() or {}
            weight_map.update(dict.fromkeys(out, file))
            after += sum(tensor.nbytes for tensor in out.values())
            write_tensors(out, staging / file, metadata)
    if (in_dir / INDEX).exists():
        write_json(staging / INDEX, {"metadata": {"total_size": after}, "weight_map": dict(sorted(weight_map.items()))})
    return QuantizeReport(layers, skipped, before, after)


def _quantize_tensor(tensor: torch.Tensor, layer: str, args: argparse.Namespace) -> tuple[dict, QuantizedLayer]:
    try:
        qweight = quantize(
            tensor, args.codebook, args.block_size, not args.no_double_quant, scale_codebook=args.scale_codebook
        )
    except ValueError as error:
        raise CommandError(f"quantize: layer {layer}: {error}") from None
    errors = squared_error(qweight, tensor)
    if args.dtype != "auto":
        qweight = replace(qweight, dtype=DTYPES[args.dtype])
    parts = weight_to_tensors(qweight, f"{layer}.weight", bitsandbytes=True)
    after = sum(part.nbytes for part in parts.values())
    return parts, QuantizedLayer(layer, tuple(tensor.shape), tensor.nbytes, after, *errors)


def _dense(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    return tensor.to(DTYPES[dtype]) if dtype != "auto" and tensor.is_floating_point() else tensor


def _copy_rest(in_dir: Path, staging: Path) -> None:
    """Tokenizer, generation settings and the like; no weights in other formats, nothing hidden."""
    for source in sorted(in_dir.rglob("*")):
        inside = source.relative_to(in_dir)
        target = staging / inside
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not source.is_file() or source.name.endswith(OTHER_WEIGHTS) or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, target)


def _print_summary(report: QuantizeReport, choice: Choice, quantized: dict[str, _Tensor], args) -> None:
    print(report.summary().split("\n\n")[0])
    kept = ", ".join(f"{count} {reason}" for reason, count in Counter(choice.reasons.values()).items())
    print(f"\nlayers chosen by {choice.source}" + (f"; kept dense: {kept}" if kept else ""))
    uneven = [name for name, tensor in quantized.items() if tensor.shape[1] % args.block_size]
    if uneven:
        print(
            f"note: in {len(uneven)} layers ({uneven[0]}, ...) a row is not a whole number of blocks of "
            f"{args.block_size}; bitsandbytes 0.50 decodes these wrongly on CPUs with AVX-512, nf4kernels does not"
        )
    print(f"wrote {args.out_dir}")
