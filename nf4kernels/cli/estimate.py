"""nf4kernels estimate: the memory to load, to train and to serve a model, from its config.json alone."""

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import CommandError

GIB = 2**30
CARDS = (24, 48, 80)
PARTS = (
    ("4-bit weights", "weights"), ("scales", "scales"), ("dense rest", "dense"), ("adapters", "adapters"),
    ("gradients at the peak", "gradients"), ("optimizer", "optimizer"), ("activations", "activations"),
    ("logits", "logits"), ("decoded weight", "workspace"), ("gathered from other ranks", "gathered"),
)  # fmt: skip
ON_HOST = (("optimizer, on the host", "optimizer_on_host"), ("activations, on the host", "activations_on_host"))
AT_WORK = ("activations", "logits", "workspace", "gathered")  # what is not there while a layer is gathered


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "estimate",
        help="the memory to load, train and serve a model, from its config.json",
        description="Says what a causal language model takes in 4 bits: to load it, to train adapters on it and to "
        "serve it. Only the configuration is read: one training step and one prefill are run without values, and what "
        "is alive at their peaks is counted. CUDA's own context and the allocator's rounding come on top.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a config.json, or the directory of a model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences in a micro-batch")
    parser.add_argument("--length", type=int, nargs="+", default=[512], help="tokens in a sequence")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="of the adapters on every linear layer")
    parser.add_argument(
        "--experts",
        action="store_true",
        help="adapters on the experts of a mixture, too (PEFT has them anyway on Mixtral, Qwen2 and 3)",
    )
    parser.add_argument("--codebook", default="nf4", help="as of nf4kernels quantize")
    parser.add_argument("--block-size", type=int, default=None, help="weights that share a scale")
    parser.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32")
    parser.add_argument("--scale-codebook", default="e4m3", help="of double quantization: e4m3 or dynamic8")
    parser.add_argument("--skip", metavar="PATTERN", action="append", default=[], help="leave these layers dense")
    parser.add_argument("--dtype", default="bfloat16", help="of activations and dense weights")
    parser.add_argument("--adapter-dtype", default="float32", help="of adapters and their gradients")
    parser.add_argument("--optimizer", default="adamw_torch_fused", help="by the name that transformers has for it")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations for the backward pass")
    parser.add_argument("--offload-activations", action="store_true", help="what the backward needs waits on the host")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the model; the figures are of one")
    parser.add_argument("--shard", default="fsdp2", help="how they share it: fsdp2 or zero3")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        help="print what one of so many GPUs takes under FSDP2, estimated beside a simulated step, and what it sends; a"
        " step takes seconds to simulate, of 405 billion parameters about a minute",
    )
    parser.add_argument(
        "--link",
        nargs="+",
        default=["nvlink", "pcie5", "8x400g", "400g", "25g"],
        help="of --ranks: what to send over, by name or in GB/s: nvlink (450) and pcie5 (55) within a machine of 8"
        " GPUs; between machines eight ports of 400 Gb/s each (8x400g, 360), one (400g, 45), or 25 Gb/s (25g, 2.8)",
    )
    parser.add_argument(
        "--no-reshard-after-forward", action="store_true", help="FSDP2 keeps layers gathered until their backward pass"
    )
    parser.add_argument(
        "--mixed-precision", action="store_true", help="FSDP2 gathers what is not in 4 bits in bfloat16"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--json", action="store_true", help="bytes as JSON, for programs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    try:
        from ..stages import estimate as stage
    except ImportError as error:
        raise CommandError(
            f"estimate: {error.name or error} must be installed, run: pip install 'nf4kernels[finetune]'"
        ) from None
    options = stage.Options(
        experts=args.experts, codebook=args.codebook, block_size=args.block_size,
        double_quant=not args.no_double_quant, scale_codebook=args.scale_codebook, skip=tuple(args.skip),
        dtype=args.dtype, adapter_dtype=args.adapter_dtype, optimizer=args.optimizer,
        checkpointing=not args.no_checkpointing, offload_activations=args.offload_activations,
        accumulation=args.accumulation, gpus=args.gpus, shard=args.shard, device=args.device,
        reshard_after_forward=not args.no_reshard_after_forward, mixed_precision=args.mixed_precision,
    )  # fmt: skip
    if args.ranks is not None:
        return _run_ranks(args, options)
    found = list(stage.estimates(args.config, args.batch, args.length, args.rank, options))
    if args.json:
        cards = {f"{use}_fits_gib": None for use in ("train", "serve")}
        print(json.dumps([{**each.as_dict(), **{k: _fitting(each, k) for k in cards}} for each in found], indent=2))
        return
    _print_tables(found)


def _run_ranks(args: argparse.Namespace, options: Any) -> None:
    from ..stages import rank_plan as stage

    for link in args.link:
        stage.speed(link)
    plans = stage.rank_plans(args.config, args.ranks, args.batch, args.length, args.rank, options)
    if args.json:
        print(json.dumps([each.as_dict(args.link) for each in plans], indent=2))
        return
    numbers = ("batch", "length", "rank", "ranks", "estimated", "simulated", "off", "fits", "gathers", "reduces")
    header = (*numbers, *args.link)
    for number, each in enumerate(plans):
        if not number:
            print(
                f"{each.estimate.parameters / 1e9:.2f} billion parameters in {options.codebook}; GiB at the peak of"
                " training on one rank, GB that a step gathers and reduces, seconds that this takes by link"
            )
            print("  ".join(name.rjust(max(6, len(name))) for name in header), flush=True)
        print("  ".join(cell.rjust(max(6, len(name))) for name, cell in zip(header, _rank_row(each, args.link))))


def _rank_row(each: Any, links: list[str]) -> list[str]:
    told, simulated = each.estimate.options, each.simulated
    fits = next((f"{card} GB" for card in CARDS if simulated.peak <= card * GIB), "-")
    seconds = [each.seconds(link) for link in links]
    return [
        *map(str, (told.batch, told.length, told.rank, simulated.ranks)),
        _gib(each.estimate.train), _gib(simulated.peak), f"{each.estimate.train / simulated.peak - 1:+.1%}", fits,
        f"{simulated.gathered / 1e9:.1f}", f"{simulated.reduced / 1e9:.2f}",
        *("-" if time is None else f"{time:.2f}" for time in seconds),
    ]  # fmt: skip


def _fitting(each: Any, key: str) -> list[int]:
    return [card for card in CARDS if getattr(each, key.partition("_")[0]) <= card * GIB]


def _print_tables(found: list) -> None:
    first = found[0]
    ranks = f", one of {first.options.gpus} GPUs under {first.options.shard}" if first.options.gpus > 1 else ""
    checkpoints = "with" if first.options.checkpointing else "without"
    print(f"{first.parameters / 1e9:.2f} billion parameters in {first.options.codebook}{ranks}; GiB")
    print(f"{_gib(first.load)} to load the model on one GPU\n")
    header = ("batch", "length", "rank", "train", "serve", *(f"{card} GB" for card in CARDS))
    rows = [header]
    for each in found:
        told = each.options
        fits = [_fits(each, card) for card in CARDS]
        rows.append((str(told.batch), str(told.length), str(told.rank), _gib(each.train), _gib(each.serve), *fits))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    largest = max(found, key=lambda each: each.train)
    told = largest.options
    print(f"\ntraining at batch {told.batch}, length {told.length}, rank {told.rank}, {checkpoints} checkpointing:")
    opens = largest.opening > sum(getattr(largest, name) for name in AT_WORK)
    for label, name in PARTS:
        if getattr(largest, name) and (name not in AT_WORK or not opens):
            print(f"  {label.ljust(26)}{_gib(getattr(largest, name)).rjust(8)}")
    if opens:
        print(f"  {'while a layer is gathered'.ljust(26)}{_gib(largest.opening).rjust(8)}")
    for label, name in ON_HOST:
        if getattr(largest, name):
            print(f"  {label.ljust(26)}{_gib(getattr(largest, name)).rjust(8)}")
    longest = max(found, key=lambda each: each.cache)
    print(f"serving {longest.options.batch} x {longest.options.length} tokens: {_gib(longest.cache)} of cache")
    for card in CARDS:
        trains = "fits" if largest.train <= card * GIB else "does not fit"
        serves = "fits" if longest.serve <= card * GIB else "does not fit"
        print(f"{card} GB: training {trains}, serving {serves}")


def _fits(each: Any, card: int) -> str:
    return {(True, True): "both", (True, False): "train", (False, True): "serve", (False, False): "-"}[
        each.train <= card * GIB, each.serve <= card * GIB
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
