"""Every op on a GPU beside cuBLAS bf16 and bitsandbytes, and every kernel beside the others; CSV, table and picture.

    python -m benchmarks.gpu.measure --seconds 200

The sides take turns within each round. A sample is a CUDA graph of as many calls as take about 2 ms, over so many
copies of the weight that the L2 cannot hold them. Outputs are checked against an fp64 product before they are timed.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterable

import torch

from ..shapes import EXPERTS, GPU_SHAPES, ExpertsShape
from . import cases, grouped_cases, lora_cases, summary
from .sides import BNB_MISSING, TRITON_MISSING, cuda_library, forcing
from .timing import Cuda, Run
from .weights import ExpertWeights, Weights

REPORT_SECONDS = 30  # kept for the imports before our clock starts, a row under way, the CSV, the table, the pictures
TELLING_ROWS = (1, 4, 16, 32, 64, 128, 256, 2048)  # measured first, at every shape
ROWS = (*TELLING_ROWS, 8, 512, 8192)
STEP_ROWS = (512, 2048, 8192)
LORA_ROWS, RANKS = (1, 16, 256, 2048), (16, 64)  # rank 0 is linear itself
TOKENS = (1, 16, 512, 8192)  # of experts; their rows are as many times the experts of a token


def measure(
    run: Run,
    shapes: Iterable[tuple[int, int]] = GPU_SHAPES,
    rows: Iterable[int] = ROWS,
    experts: ExpertsShape = EXPERTS["Qwen3-30B-A3B"],
    tokens: Iterable[int] = TOKENS,
) -> None:
    """Every row that fits the time, the most telling ones first."""
    rows = tuple(rows)
    telling = [M for M in rows if M in TELLING_ROWS]
    for stage in (telling, [M for M in rows if M not in telling]):
        for shape in shapes:
            work = [(cases.measure_quantize,), (cases.measure_dequantize,)] if stage is telling else []
            work += [(function, M) for M in stage for function in (cases.measure_linear, cases.measure_dgrad)]
            work += [(lora_cases.measure_lora, M, rank) for M in stage if M in LORA_ROWS for rank in RANKS]
            work += [(lora_cases.measure_step, M) for M in stage if M in STEP_ROWS]
            if run.has_time():
                _measure_each(run, work, Weights(shape, run.machine))
            run.machine.between_shapes()
        if stage is telling and run.has_time():
            work = [(grouped_cases.measure_grouped, count) for count in tokens]
            _measure_each(run, work, ExpertWeights(experts, run.machine))
            run.machine.between_shapes()
    if run.skipped:
        run.say(f"out of time: {run.skipped} rows or shapes were not measured")


def _measure_each(run: Run, work: list[tuple], weights: Weights | ExpertWeights) -> None:
    for function, *size in work:
        if run.has_time():
            function(run, weights, *size)


def main() -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=200, help="in all (default: %(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that what is measured is written
    torch.manual_seed(0)
    run = Run(
        Cuda(cuda_library().forget_graphs), forcing(), begin + args.seconds - REPORT_SECONDS, keep=summary.write_rows
    )
    for missing in filter(None, (BNB_MISSING, TRITON_MISSING)):
        run.say(missing)
    run.measure_limits()
    try:
        measure(run)
    finally:
        print(summary.summary(run), flush=True)
        print(*(f"written: {path}" for path in summary.write(run)), sep="\n", flush=True)
    if run.wrong:
        raise SystemExit(f"{run.wrong} results were wrong")


if __name__ == "__main__":
    main()
