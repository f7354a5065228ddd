"""Measures the configurations of Triton's products on this GPU, and writes the table that the backend then reads.

    python -m benchmarks.gpu.tune_triton --seconds 480

For each op and bucket of M one field after the other of the configuration takes the value with the least time, as a
geometric mean over the shapes of 8B models, until no field changes; then the least M is looked for at which
dequantize + GEMM is faster. A configuration is checked against an fp64 product before it is timed. The table is
written when all of it was measured, and never by anything but this command.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

import nf4kernels as nf4
from nf4kernels.backends.triton import OPS
from nf4kernels.backends.triton.choose import PRODUCTS, TABLES, Config, Table, architecture_of, forcing, table_for

from ..checks import assert_as_exact_as_dense
from ..harness import rotate, take_turns
from .timing import Cuda

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
# What each field of a configuration may be, in the order in which they are tried.
CHOICES = {
    "depth": (512, 1024, 2048, 4096, 8192),
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (2, 3, 4, 5),
}
ROUNDS = 2  # over all fields
MOST_M = 512  # that the last bucket is measured at
GEMM_M = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
TOO_LARGE = math.inf  # the time of a configuration that the device has no shared memory or registers for
Timer = Callable[[str, int, str, Config], float]  # op, M, path, configuration -> ms


def best_config(start: Config, cost: Callable[[Config], float], choices: dict[str, tuple] = CHOICES) -> Config:
    """Coordinate descent from `start`."""
    costs = {start: cost(start)}

    def known(config: Config) -> float:
        if config not in costs:
            costs[config] = cost(config)
        return costs[config]

    best = start
    for _ in range(ROUNDS):
        before = best
        for name, values in choices.items():
            best = min((best, *(replace(best, **{name: value}) for value in values)), key=known)
        if best == before:
            break
    if known(best) == TOO_LARGE:
        raise RuntimeError(f"tune_triton: no configuration near {start} runs on this device")
    return best


def gemm_from(fused: Callable[[int], float], gemm: Callable[[int], float], all_m: Sequence[int] = GEMM_M) -> int:
    """The least M from which on dequantize + GEMM is always faster; beyond the last one where it never is."""
    least = all_m[-1] + 1
    for M in reversed(all_m):
        if gemm(M) >= fused(M):
            break
        least = M
    return least


def tune(timer: Timer, start: Table, origin: str, say: Callable[[str], None] = print) -> Table:
    """The table of the least times, with the buckets of `start`."""
    configs, limits = {}, {}
    for op in PRODUCTS:
        buckets = []
        for most, config in start.configs[op]:
            M = min(most, MOST_M)
            best = best_config(config, lambda c, op=op, M=M: timer(op, M, "fused", c))
            say(f"{op} M <= {most}: {best}, {timer(op, M, 'fused', best):.4f} ms")
            buckets.append((most, best))
        configs[op] = tuple(buckets)
        found = Table(origin, configs, {})
        limits[op] = gemm_from(
            lambda M, op=op, found=found: timer(op, M, "fused", found.config(op, M)),
            lambda M, op=op, found=found: timer(op, M, "dequantize_gemm", found.config(op, M)),
        )
        say(f"{op}: dequantize + GEMM from M = {limits[op]}")
    return Table(origin, configs, limits)


@dataclass
class Bench:
    """Times products on a device: a Timer."""

    machine: Cuda
    deadline: float
    shapes: Sequence[tuple[int, int]] = SHAPES
    seconds: float = 0.02  # a sample of one configuration at one shape
    weights: dict = field(default_factory=dict)  # shape -> what `weight` returns

    def __call__(self, op: str, M: int, path: str, config: Config) -> float:
        """The geometric mean over the shapes."""
        logarithms = [math.log(self.ms(op, M, path, config, *shape)) for shape in self.shapes]
        return math.exp(sum(logarithms) / len(logarithms))

    def ms(self, op: str, M: int, path: str, config: Config, N: int, K: int) -> float:
        if time.perf_counter() > self.deadline:
            raise TimeoutError("tune_triton: the time is over; nothing was written, give it more --seconds")
        next_weight, copies, dense = self.weight(N, K)
        x = torch.randn(M, K if op == "linear" else N, device=self.machine.device, dtype=torch.bfloat16)
        bias = (None,) if op == "linear" else ()

        def product() -> torch.Tensor:
            return OPS[op](x, *next_weight().op_args(), *bias)

        try:
            with forcing(path, config):
                if dense is not None:
                    matrix = dense.T if op == "linear" else dense
                    assert_as_exact_as_dense(product(), x, matrix, f"{op} {path} {config}")
                return min(take_turns({"": self.machine.sampler(product, copies)}, self.seconds)[""])
        except OutOfResources:
            return TOO_LARGE

    def weight(self, N: int, K: int) -> tuple[Callable[[], nf4.QuantizedWeight], int, torch.Tensor | None]:
        """(equal weights in turn, as many as the L2 cannot hold; how many; Ŵ of the shape that is checked)."""
        if (N, K) not in self.weights:
            first = nf4.quantize(torch.randn(N, K, device=self.machine.device) * 0.02)
            copies = max(2, math.ceil(2 * self.machine.cache_bytes / first.nbytes))
            equal = [first, *(replace(first, packed=first.packed.clone()) for _ in range(copies - 1))]
            dense = nf4.dequantize(first, torch.float32) if self.shapes[0] == (N, K) else None
            self.weights[N, K] = rotate(equal), copies, dense
        return self.weights[N, K]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--output", type=Path, help="the table; by default the one that this device reads from now on")
    options = parser.parse_args(arguments)
    machine = Cuda()
    architecture = architecture_of(machine.device)
    shapes = ", ".join(f"{N}x{K}" for N, K in SHAPES)
    origin = f"measured on {machine.name}, torch {torch.__version__}, triton {triton.__version__}, bf16, {shapes}"
    table = tune(Bench(machine, time.perf_counter() + options.seconds), table_for(architecture), origin)
    path = options.output or TABLES / f"{architecture}.json"
    path.write_text(table.to_json())
    print(f"{path}: {origin}")


if __name__ == "__main__":
    main()
