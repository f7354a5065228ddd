"""Weak scaling of a QLoRA step: two processes with one thread each, and as much work each, beside one such process.

    python -m benchmarks.model.weak_scaling [--rows 2] [--layers 30] [--rounds 11]

A model of SmolLM2-135M's sizes with random weights and LoRA of rank 16, under torch's DDP on gloo, which averages the
adapters' gradients. Within one run the two take turns: while one process works alone the other sleeps. Prints both
times and the efficiency, the time of one over the time of two: the median of the rounds' ratios with the 20th and 80th
percentiles.
"""

import argparse
import os
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from ..harness import OURS, is_disturbed, ratios, spread, take_turns, watch_others
from .bench_model import LENGTH, as_side, random_model, training_step

RANKS = 2
LIMIT = timedelta(minutes=5)


def cpu_seconds() -> float:
    """Of all ranks."""
    seconds = torch.tensor([time.process_time()], dtype=torch.float64)
    dist.all_reduce(seconds)
    return seconds.item()


def work(rank: int, store: str, rows: int, layers: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=LIMIT
    )  # fmt: skip
    steps = {}
    for ranks in (1, RANKS):
        torch.manual_seed(0)
        model = as_side(OURS, random_model(layers))
        ids = torch.randint(model.config.vocab_size, (RANKS, rows, LENGTH))[rank]
        steps[ranks] = training_step(model if ranks == 1 else DistributedDataParallel(model), ids)

    def sample(ranks: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        if rank < ranks:
            steps[ranks]()
        took = time.perf_counter() - began
        dist.barrier()
        return took * 1e3

    for ranks in steps:
        sample(ranks)
    others = watch_others(cpu_seconds)
    samplers = {str(ranks): partial(sample, ranks) for ranks in steps}
    samples = take_turns(samplers, float("inf"), most=rounds)  # as many rounds on each rank
    busy = others()
    if rank == 0:
        report(rows, layers, samples, busy)
    dist.destroy_process_group()


def report(rows: int, layers: int, samples: dict[str, list[float]], busy: float | None) -> None:
    one, two = samples["1"], samples[str(RANKS)]
    print(
        f"SmolLM2-135M's sizes, {layers} layers, {rows} x {LENGTH} tokens a process, one thread each, {len(one)} rounds"
    )
    for ranks, times in samples.items():
        low, median, high = spread(times)
        print(f"{ranks} process{'' if ranks == '1' else 'es'}: {median:.0f} ms a step ({low:.0f}-{high:.0f})")
    low, median, high = ratios(one, two)
    print(f"efficiency: {median:.3f} ({low:.3f}-{high:.3f})")
    if busy is not None:
        print(f"other processes used {busy:.2f} cores" + (": DISTURBED" if is_disturbed(busy) else ""))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model.weak_scaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=2, help="a process, a step (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="(default: %(default)s)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (str(Path(folder) / "store"), args.rows, args.layers, args.rounds), nprocs=RANKS)


if __name__ == "__main__":
    main()
