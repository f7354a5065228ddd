"""nf4kernels tune: measure which kernels the products run by on this GPU, and keep it for this user."""

import argparse
from pathlib import Path

import torch

from ..backends.info import backend_info
from ..backends.select import GPU_KEYS
from ..backends.tuned_table import ANY_ROWS, CudaOp, Table
from ..tuning.tune import QUICK_SECONDS, SECONDS, TuneError, tune
from .errors import CommandError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="measure this GPU, so that its own numbers choose the kernels",
        description="Measure, in two minutes, from how many rows on each kernel and tile is the fastest on this GPU, "
        "how far to split, Triton's configurations, and CUDA against Triton. The table goes to the user's cache "
        "(NF4KERNELS_CACHE, else XDG_CACHE_HOME/nf4kernels, else ~/.cache/nf4kernels) and is read from the next "
        "process on, until the driver, torch, Triton or this package changes; `nf4kernels info` shows it. What there "
        "was no time for stays as it was predicted. Let nothing else run on the GPU meanwhile.",
    )
    parser.add_argument(
        "--quick", action="store_true",
        help=f"one shape and no configurations of Triton: {QUICK_SECONDS:.0f} seconds instead of {SECONDS:.0f}",
    )  # fmt: skip
    parser.add_argument("--device", type=_parsed, metavar="DEVICE", help="cuda:1, for example; else the first GPU")
    parser.add_argument(
        "--output", type=Path, metavar="PATH",
        help="write the table to this file, or into this folder by the card's name, where nothing reads it",
    )  # fmt: skip
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    try:
        path, table = tune(_device(args.device), args.quick, args.output)
    except (TuneError, OSError) as error:
        raise CommandError(f"tune: {error}") from None
    _print_summary(path, table)


def _parsed(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be a device like cuda:0, got {text}") from None


def _device(wanted: torch.device | None) -> torch.device:
    """The one that was asked for, or the first GPU; CommandError where there is none."""
    kinds = [kind for kind in GPU_KEYS if torch.get_device_module(kind).is_available()]
    if not kinds:
        raise CommandError(f"tune: there must be a GPU to measure, got none: {backend_info().devices['cuda'][1]}")
    device = torch.device(kinds[0], 0) if wanted is None else torch.device(wanted.type, wanted.index or 0)
    if device.type not in kinds or device.index >= torch.get_device_module(device.type).device_count():
        raise CommandError(f"tune: --device must be a GPU of this machine, got {wanted}")
    return device


def _print_summary(path: Path, table: Table) -> None:
    print(f"{table.card}, {table.origin}")
    for op, own in table.cuda.items():
        print(f"  {op}: {_ranges(own)}")
    for op, rows in table.triton.items():
        print(f"  {op} in Triton: configurations up to {', '.join(map(str, rows))} rows")
    for op, least in table.dequantize_gemm_from.items():
        from_rows = f"from {least} rows on" if least < ANY_ROWS else "with no number of rows"
        print(f"  {op} in Triton: dequantize + GEMM {from_rows}")
    for rule in table.rules:
        print(f"  {rule}")
    print(f"wrote {path}")


def _ranges(own: CudaOp) -> str:
    """Which kernel runs up to how many rows: "small to 16, tiled to 352, dequantize_gemm"; of tiled each tile."""
    if any(tile.up_to < ANY_ROWS for tile in own.tiles):
        tiled = [(tile.tile, min(tile.up_to, own.tiled)) for tile in own.tiles]
    else:
        costs = ", ".join(f"{tile.tile} {tile.cost / 1000:.2f}" for tile in own.tiles)
        tiled = [(f"tiled (cost by what is predicted: {costs})", own.tiled)]
    parts, last = [], 0
    for name, limit in [("small", own.small), *tiled, ("dequantize_gemm", ANY_ROWS)]:
        if limit > last:
            parts.append(name if limit >= ANY_ROWS else f"{name} to {limit}")
            last = limit
    return ", ".join(parts)
