"""A QLoRA training step of SmolLM2's sizes on each instruction set, for torch, oneDNN and MKL as well as for ours.

    python -m benchmarks.model.bench_isa [--isas avx512_bf16 avx512 avx2] [--layers 30] [--rounds 7] [--bf16]

Each side is a process of its own, since libraries read these variables when they are loaded; they take turns, a step at
a time, and sleep in between. A side trains in the dtype that `prepare_for_training` chooses there (bf16 with bf16
instructions, else fp32), and in fp32 where that is not it; `--bf16` adds bf16 where it is slow, which takes minutes.
Prints each side's time, and how many times that of the first side it is: the median of the rounds' ratios with the 20th
and 80th percentile. Weights are random; 4 x 128 tokens, LoRA of rank 16, two threads.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from nf4kernels.backends import select

from ..harness import ROOT, Spread, ratios, spread, take_turns
from .bench_model import BATCH, LENGTH, OURS, as_side, random_model, training_step

# What makes a library compute as on a CPU that has no more than this.
ENVIRONMENTS = {
    "avx512_bf16": {"NF4KERNELS_CPU_ISA": "avx512_bf16"},
    "avx512": {"NF4KERNELS_CPU_ISA": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {
        "NF4KERNELS_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def serve(dtype: str, threads: str, layers: str) -> None:
    """A step for each line of standard input, its milliseconds on standard output."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model = as_side(OURS, random_model(int(layers)))
    model._apply(lambda tensor: tensor.to(DTYPES[dtype]) if tensor.dtype == torch.bfloat16 else tensor)
    step = training_step(model, torch.randint(model.config.vocab_size, (BATCH, LENGTH)))
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print((time.perf_counter() - began) * 1e3, flush=True)


class Side:
    """The process that trains on one instruction set in one dtype."""

    def __init__(self, isa: str, dtype: str, threads: int, layers: int) -> None:
        others = {name for environment in ENVIRONMENTS.values() for name in environment}
        clean = {name: value for name, value in os.environ.items() if name not in others}
        code = "import sys; from benchmarks.model import bench_isa; bench_isa.serve(*sys.argv[1:])"
        self.process: Any = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, dtype, str(threads), str(layers)], cwd=ROOT,
            env=clean | ENVIRONMENTS[isa], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with status {self.process.wait()}; its message stands above")
        return line.strip()

    def milliseconds(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.answer())

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def sides_of(isas: list[str], with_slow_bf16: bool) -> list[tuple[str, str]]:
    """(instruction set, dtype) of every side, the one that others are compared with first."""
    chosen = [(isa, "bf16") for isa in isas if isa == "avx512_bf16" or with_slow_bf16]
    return sorted([*chosen, *((isa, "fp32") for isa in isas)], key=lambda side: isas.index(side[0]))


def measure(sides: list[tuple[str, str]], threads: int, layers: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each side's step in each round."""
    with ExitStack() as stack:
        started = {}
        for isa, dtype in sides:  # one after the other: two that set up at once would slow each other down
            started[f"{isa} {dtype}"] = side = stack.enter_context(Side(isa, dtype, threads, layers))
            side.answer()
        samplers = {name: partial(Side.milliseconds, side) for name, side in started.items()}
        return take_turns(samplers, float("inf"), most=rounds)


def lines(samples: dict[str, list[float]]) -> list[str]:
    """One a side; ratios are to the first side."""
    (first, base), *_ = samples.items()
    told = []
    for name, times in samples.items():
        low, median, high = spread(times)
        text = f"{name:16} {median:7.0f} ms a step ({low:.0f}-{high:.0f})"
        ratio: Spread = ratios(times, base)
        told.append(text if name == first else f"{text}, {ratio[1]:.2f}x {first} ({ratio[0]:.2f}-{ratio[2]:.2f})")
    return told


def main() -> None:
    library = select.CPU_LIBRARY
    can = [isa for isa in ENVIRONMENTS if library is not None and isa in library.isas]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isas", nargs="+", choices=can, default=can)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bf16 also where it is slow")
    args = parser.parse_args()
    samples = measure(sides_of(args.isas, args.bf16), args.threads, args.layers, args.rounds)
    print(f"SmolLM2-135M's sizes, {args.layers} layers, {BATCH}x{LENGTH} tokens, {args.threads} threads")
    print("\n".join(lines(samples)))


if __name__ == "__main__":
    main()
