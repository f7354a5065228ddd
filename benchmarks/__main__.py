"""Measure every op beside its peers, print the tables, and write results/<machine>.csv and its pictures.

Without a selection: both shapes of shapes.FOCUS at every M, with all threads and with one, the first in a cache, too;
long rows at M = 1 to 4; the other models' shapes at fewer M, out of cache, with all threads; one shape with each lesser
instruction set forced on every side; the experts of shapes.EXPERTS with all threads; and a whole model: about seventeen
minutes on two cores.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from . import forced, peer_ggml, plans
from .harness import DTYPES, Plan, Row, is_disturbed, machine
from .limits import Limits
from .model import bench_decode, bench_model
from .ops import (
    bench_dequantize,
    bench_dequantize_gemm,
    bench_experts,
    bench_formats,
    bench_grouped_linear,
    bench_grouped_lora,
    bench_linear,
    bench_linear_dgrad,
    bench_lora,
    bench_quantize,
)
from .peers import Layers
from .report import plots
from .report import tables as report
from .report.goals import SHAPE, rule
from .shapes import EXPERTS, FOCUS, layer_names

OPS = {
    "quantize": bench_quantize,
    "dequantize": bench_dequantize,
    "linear": bench_linear,
    "linear_dgrad": bench_linear_dgrad,
    "lora": bench_lora,
}
NAMES = (*OPS, "dequantize_gemm", "formats", "grouped", "experts", "model", "decode")


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def shape(text: str) -> tuple[int, int]:
    N, K = text.split("x")
    return int(N), int(K)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(NAMES)}; all if none is named")
    parser.add_argument("--all", action="store_true", help="every op at every shape and M (most of an hour)")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxK", help="these weights, at every M")
    parser.add_argument("--rows", type=whole_numbers, metavar="M,...", help="these numbers of rows of x")
    parser.add_argument("--threads", type=whole_numbers, metavar="T,...", help="torch threads (default: torch's and 1)")
    parser.add_argument("--cache", choices=("in", "out"), help="only with the weight in a cache, or in none")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of x and dense weights, of linear and linear_dgrad (default: bf16)"
    )
    parser.add_argument("--isa", choices=forced.LEVELS, help="forced on every side of linear and linear_dgrad")
    parser.add_argument("--seconds", type=float, default=2.0, help="a row, all sides together (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="write here (default: results/<machine>.csv of the usual run)")
    parser.add_argument(
        "--docs", action="store_true", help="measure nothing: bring README and docs/speed.md up to their CSV, or --csv"
    )
    args = parser.parse_args()
    unknown = set(args.ops) - set(NAMES)
    if unknown:
        parser.error(f"op must be one of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    if (args.isa or args.dtype) and not set(args.ops or NAMES) <= set(forced.ROWS) and (args.ops or not args.isa):
        parser.error(f"--isa and --dtype are of {', '.join(forced.ROWS)}, got {', '.join(args.ops) or 'no op'}")
    args.selected = bool(args.ops or args.shapes or args.rows or args.cache or args.threads or args.isa)
    is_usual = not args.selected and not args.all and args.seconds == parser.get_default("seconds")
    if args.csv is None and is_usual and not args.docs:
        args.csv = report.csv_path(machine())
    default_threads = tuple(dict.fromkeys((torch.get_num_threads(), 1)))
    args.threads_given, args.threads = args.threads, args.threads or default_threads
    return args


def measure_weights(work: Iterator[plans.Work], limits: Limits, isa: str = "") -> Iterator[Row]:
    names = layer_names()
    for weight, dtype, planned in work:
        print(f"{weight[0]}x{weight[1]}, {dtype}: {names.get(weight, 'no model of shapes.py')}")
        layers = Layers(*weight, dtype)
        for op, plan in planned:
            for row in OPS[op].rows(layers, limits, plan):
                row.isa = isa
                yield row


def measure(args: argparse.Namespace) -> Iterator[Row]:
    if args.isa:
        yield from measure_weights(plans.forced_work(args), Limits(torch.float32), args.isa)
        return
    if peer_ggml.load() is None:
        print(peer_ggml.MISSING)
    limits = Limits()
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(limits)
    torch.set_num_threads(args.threads[0])
    print("ours in ms, then how many times faster it is than each peer: median over the rounds (p20-p80)\n")
    yield from measure_weights(plans.work(args, tuple(OPS)), limits)
    if not args.selected:
        for level in forced.lesser_levels():
            print(f"with {level} forced on every side, which takes a minute or two:", flush=True)
            with TemporaryDirectory() as folder:
                path = Path(folder) / "rows.csv"
                forced.measure(level, args.threads[0], path)
                yield from report.read_csv(path)[0]
    if "dequantize_gemm" in args.ops:
        for weight in args.shapes or FOCUS[:1]:
            print(f"products of the packed bytes beside dequantize + GEMM, {weight[0]}x{weight[1]}")
            plan = Plan(args.rows or bench_dequantize_gemm.M, args.threads, (args.cache or "out",), args.seconds)
            yield from bench_dequantize_gemm.rows(Layers(*weight), plan)
    if "formats" in args.ops:
        for weight in args.shapes or FOCUS[:1]:
            print(f"nf4 at block size 64 beside other formats and dense, {weight[0]}x{weight[1]}")
            caches = (args.cache,) if args.cache else ("out",)
            rows, threads = args.rows or bench_formats.FORWARD_M, args.threads_given or args.threads[:1]
            yield from bench_formats.rows(Layers(*weight), Plan(rows, threads, caches, args.seconds))
    if "grouped" in args.ops or not (args.ops or args.shapes or args.cache == "in"):
        for model, experts in EXPERTS.items():
            print(f"{experts.experts} experts of {experts.N}x{experts.K}, {experts.top_k} a token: {model}")
            plan = Plan(
                args.rows or bench_grouped_linear.TOKENS, args.threads_given or args.threads[:1], ("out",), args.seconds
            )
            yield from bench_grouped_linear.rows(experts, limits, plan)
            yield from bench_grouped_lora.rows(experts, limits, plan)
    if "experts" in args.ops or not (args.ops or args.shapes or args.cache == "in"):
        tokens = args.rows or (bench_experts.TOKENS if args.ops else bench_experts.FEW_TOKENS)
        for experts in bench_experts.SHAPES:
            plan = Plan(tokens, args.threads_given or args.threads[:1], ("out",), args.seconds)
            yield from bench_experts.rows(experts, plan)
    if "model" in args.ops or not (args.ops or args.shapes):
        yield from bench_model.rows(Plan(threads=args.threads, seconds=args.seconds))
    if "decode" in args.ops:
        yield from bench_decode.rows(Plan(threads=args.threads, seconds=args.seconds))


def main() -> None:
    args = parse()
    if args.docs:
        for document in report.SECTIONS:
            document.write_text(report.with_section(document, args.csv), encoding="utf-8")
        return
    if args.isa and forced.in_force() != args.isa:
        forced.restart(args.isa)
    torch.manual_seed(0)
    about = machine() | {"ggml": str(peer_ggml.load() or "not installed")}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    for row in measure(args):
        print(row, flush=True)
        rows.append(row)
    print(
        f"\nthe goals, on a {SHAPE} weight out of cache with all threads, and on a model\n\n{report.goal_table(rows)}"
    )
    print("\n".join([f"the rule: {rule(rows)}", *report.rule_lists(rows)]))
    disturbed = sum(is_disturbed(row.others) for row in rows)
    if disturbed:
        print(f"{disturbed} of {len(rows)} rows were DISTURBED by other processes: measure again on an idle machine")
    if args.csv:
        report.write_csv(args.csv, rows, about)
        for path in (args.csv, *plots.draw(rows, about, args.csv)):
            print(f"written: {path}")


main()
