"""Measure the ways of nf4kernels.recover beside each other, and print the table.

    python -m benchmarks.recover                  every row that results/recover.csv does not hold yet
    python -m benchmarks.recover --rows 'GPTQ*'   these alone; with --again, anew
    python -m benchmarks.recover --list           the rows
    python -m benchmarks.recover --docs           measure nothing: bring docs/recover.md up to the CSV

A row is written as soon as it is measured, so that the same command goes on where it was stopped.
"""

import argparse
import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from nf4kernels.model.memory import model_bytes

from ..harness import commit, machine
from . import table
from .setting import Setting, Way
from .table import Record
from .ways import WAYS

STARTS = ("lora_A.start", "lora_B.start")  # kept in memory alone, for what an adapter over the original weight is


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="names or patterns of rows")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="of those that a row has")
    parser.add_argument("--again", action="store_true", help="measure what was measured, too")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the model is (default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=table.CSV, help="of the rows (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the rows' names and seeds")
    parser.add_argument("--docs", action="store_true", help="bring docs/recover.md up to the CSV")
    return parser.parse_args()


def measure(setting: Setting, way: Way, seed: int, about: dict[str, str]) -> Record:
    torch.manual_seed(seed)  # adapters are drawn
    setting.memory.saved, began = 0.0, time.perf_counter()
    model = way.build(setting, seed).eval()
    seconds = time.perf_counter() - began + setting.memory.saved
    taken = model_bytes(model) - sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(STARTS))
    scores = setting.scores(model)
    same, other = scores.same, scores.other
    return Record(
        way.name, seed, taken / 1e6, 8 * (taken - setting.other_bytes) / setting.weights, same.loss, same.kl,
        same.top1, other.loss, other.kl, other.top1, seconds, same.rows, about["machine"], commit(), about["date"],
    )  # fmt: skip


def main() -> None:
    args = parse()
    chosen = [way for way in WAYS if not args.rows or any(fnmatchcase(way.name, rows) for rows in args.rows)]
    if args.list:
        for way in chosen:
            print(f"{way.group:12}  {way.name}  seeds {', '.join(map(str, way.seeds))}")
        return
    records = table.read(args.csv)
    if not args.docs:
        todo = [(way, seed) for way in chosen for seed in way.seeds if not args.seeds or seed in args.seeds]
        has = {(record.way, record.seed) for record in records}
        todo = [(way, seed) for way, seed in todo if args.again or (way.name, seed) not in has]
        logging.disable_progress_bar()  # transformers has one for each model that it reads
        setting, about = Setting(args.cache), machine()
        bar = tqdm(todo, unit="row")
        for way, seed in bar:
            bar.set_description(f"{way.name}, seed {seed}")
            record = measure(setting, way, seed, about)
            kept = [each for each in table.read(args.csv) if (each.way, each.seed) != (way.name, seed)]
            table.write([*kept, record], args.csv)
        records = table.read(args.csv)
    section = table.table(records, WAYS if args.docs else chosen)
    print(section)
    if args.docs:
        table.GUIDE.write_text(table.with_table(table.GUIDE.read_text(encoding="utf-8"), section), encoding="utf-8")


if __name__ == "__main__":
    main()
