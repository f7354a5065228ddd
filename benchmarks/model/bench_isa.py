"""A QLoRA training step of SmolLM2's sizes on each instruction set, for torch, oneDNN and MKL as well as for ours.

    python -m benchmarks.model.bench_isa [avx512_bf16:bf16 avx512:fp32 avx2:fp32] [--layers 30] [--rounds 7]

Each side, an instruction set and the dtype that is not in 4 bits, is a process of its own, since libraries read these
variables when they are loaded; they take turns, a step at a time. Without sides: every instruction set that this
machine has, in the dtype that `prepare_for_training` chooses there. `avx2:bf16` takes most of a minute a step.

Prints each side's time, and how many times that of the first side it is: the median of the rounds' ratios with the 20th
and 80th percentile. Weights are random; 4 x 128 tokens, LoRA of rank 16, two threads.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch

from nf4kernels.backends import select

from ..forced import LEVELS
from ..harness import ROOT, Spread, ratios, spread, take_turns
from .bench_model import BATCH, LENGTH, OURS, as_side, random_model, training_step

ENVIRONMENTS = {"amx_bf16": {}, **LEVELS}
ISAS = [isa for isa in ENVIRONMENTS if select.CPU_LIBRARY is not None and isa in select.CPU_LIBRARY.isas]
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
        others = {"NF4KERNELS_CPU_ISA", *(name for environment in ENVIRONMENTS.values() for name in environment)}
        clean = {name: value for name, value in os.environ.items() if name not in others}
        code = "import sys; from benchmarks.model import bench_isa; bench_isa.serve(*sys.argv[1:])"
        self.process: Any = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, dtype, str(threads), str(layers)], cwd=ROOT,
            env=clean | ENVIRONMENTS[isa] | {"NF4KERNELS_CPU_ISA": isa}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, encoding="utf-8",
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


def side(text: str) -> tuple[str, str]:
    """For argparse: "avx2:fp32" as ("avx2", "fp32")."""
    isa, _, dtype = text.partition(":")
    if isa not in ISAS or dtype not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"must be one of {' '.join(ISAS)}, then a colon and one of {' '.join(DTYPES)}, got {text!r}"
        )
    return isa, dtype


def measure(sides: list[tuple[str, str]], threads: int, layers: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each side's step in each round."""
    with ExitStack() as stack:
        started = {f"{isa} {dtype}": stack.enter_context(Side(isa, dtype, threads, layers)) for isa, dtype in sides}
        for each in started.values():
            each.answer()
        samplers = {name: each.milliseconds for name, each in started.items()}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", type=side, metavar="isa:dtype")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    sides = args.sides or [(isa, "bf16" if isa.endswith("_bf16") else "fp32") for isa in ISAS]
    samples = measure(sides, args.threads, args.layers, args.rounds)
    print(f"SmolLM2-135M's sizes, {args.layers} layers, {BATCH}x{LENGTH} tokens, {args.threads} threads")
    print("\n".join(lines(samples)))


if __name__ == "__main__":
    main()
