"""python -m benchmarks [op ...]: measure, print the table, write results/<cpu>.csv."""

import argparse

import torch

from . import bench_dequantize, bench_linear, bench_linear_dgrad, bench_quantize
from .harness import RESULTS, Limits, machine, write_csv

BENCHMARKS = {
    "quantize": bench_quantize,
    "dequantize": bench_dequantize,
    "linear": bench_linear,
    "linear_dgrad": bench_linear_dgrad,
}

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("ops", nargs="*", metavar="op", help=f"which of {', '.join(BENCHMARKS)}; all if none is named")
parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
args = parser.parse_args()
unknown = set(args.ops) - set(BENCHMARKS)
if unknown:
    parser.error(f"op must be one of {', '.join(BENCHMARKS)}, got {', '.join(sorted(unknown))}")
if args.threads:
    torch.set_num_threads(args.threads)

torch.manual_seed(0)
about = machine()
print(", ".join(f"{key} {value}" for key, value in about.items()))
limits = Limits.measure()
print(
    f"limits in this run: reading {limits.read_gb_s:.1f} GB/s, copying {limits.copy_gb_s:.1f} GB/s, "
    f"dense bf16 at M=512 {limits.bf16_gflop_s:.0f} GFLOP/s"
)
print("ours in ms, then how many times faster it is than each peer: median over the rounds (p20-p80)\n")
rows = []
for name in args.ops or BENCHMARKS:
    for row in BENCHMARKS[name].rows(limits):
        print(row, flush=True)
        rows.append(row)
if not args.ops:
    print(f"\nwritten to {write_csv(rows, about).relative_to(RESULTS.parent.parent)}")
