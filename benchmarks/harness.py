"""Fair timing: all sides alternate in one run, medians and ratios, and the machine's own limits beside them."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import nf4kernels as nf4

RESULTS = Path(__file__).parent / "results"
OURS = "nf4kernels"
CACHE_BYTES = 96 << 20  # weights rotate over three times the L3 of the machines measured so far


@dataclass
class Row:
    """One line of the table: what each side took, and the floor for ours."""

    op: str
    shape: str
    M: str
    ms: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]  # side -> how much faster ours is: p20, median, p80
    floor_ms: float | None = None

    def __str__(self) -> str:
        share = "" if self.floor_ms is None else f"{self.floor_ms / self.ms[OURS]:5.0%} of floor"
        text = f"{self.op:16} {self.shape:12} {self.M:>5} | {self.ms[OURS]:8.3f} ms {share:14} |"
        return text + " |".join(f" {r[1]:6.2f}x {side} ({r[0]:.2f}-{r[2]:.2f})" for side, r in self.ratios.items())


def rotate(values: list) -> Callable:
    """A function that returns the values in turn, over and over."""
    position = [0]

    def next_value():
        position[0] = (position[0] + 1) % len(values)
        return values[position[0]]

    return next_value


def copies(nbytes: int) -> int:
    """How many weights of this size no cache holds together."""
    return max(2, -(-CACHE_BYTES // nbytes))


def alternate(sides: dict[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 15) -> dict[str, list[float]]:
    """Per-call milliseconds of each side in each round; a round times every side once, for at least 5 ms.

    As many rounds as fit `seconds` a side, but at least 5 and at most `rounds`.
    """
    calls = {}
    for name, run in sides.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(0.005 / max(time.perf_counter() - start, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    deadline = time.perf_counter() + seconds * len(sides)
    while len(samples[OURS]) < 5 or (len(samples[OURS]) < rounds and time.perf_counter() < deadline):
        for name, run in sides.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - start) / calls[name] * 1e3)
    return samples


def measure(op: str, shape: tuple[int, int], M: int | str, sides: dict, floor_ms: float | None = None) -> Row:
    """Time the sides and put ours beside each of the others: the median over the rounds of the round's ratio."""
    samples = alternate(sides)
    ratios = {}
    for name in sides:
        if name != OURS:
            per_round = sorted(other / ours for other, ours in zip(samples[name], samples[OURS]))
            ratios[name] = tuple(per_round[int(q * (len(per_round) - 1))] for q in (0.2, 0.5, 0.8))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return Row(op, f"{shape[0]}x{shape[1]}", str(M), medians, ratios, floor_ms)


@dataclass
class Limits:
    """What this machine can do, measured in this run."""

    read_gb_s: float  # summing bytes that no cache holds
    copy_gb_s: float  # read and written bytes of a copy that no cache holds
    bf16_gflop_s: float  # dense bf16 product at M = 512

    @classmethod
    def measure(cls) -> "Limits":
        source = torch.randint(0, 255, (CACHE_BYTES,), dtype=torch.uint8).view(torch.int64)
        target = torch.empty_like(source)
        x, w = torch.randn(512, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
        sides = {
            OURS: lambda: source.sum(),
            "copy": lambda: target.copy_(source),
            "product": lambda: torch.nn.functional.linear(x, w),
        }
        ms = {name: statistics.median(values) for name, values in alternate(sides).items()}
        return cls(
            CACHE_BYTES / ms[OURS] / 1e6, 2 * CACHE_BYTES / ms["copy"] / 1e6, 2 * 512 * 4096**2 / ms["product"] / 1e6
        )

    def floor_ms(self, *, read: float = 0, write: float = 0, flops: float = 0) -> float:
        """The longest of reading alone, moving both ways, and computing."""
        moving = (read + write) / self.copy_gb_s if write else read / self.read_gb_s
        return max(moving, flops / self.bf16_gflop_s) / 1e6


def machine() -> dict[str, str]:
    """What a result must say about where it was measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1)) for line in info.read_text().splitlines() if ":" in line
        )
        cpu = f"{fields.get('model name', cpu)} family {fields.get('cpu family')} model {fields.get('model')}"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "kernels": nf4.backend_info().devices["cpu"][0],
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def write_csv(rows: Iterator[Row], about: dict[str, str]) -> Path:
    """Every row with every side's milliseconds, as results/<cpu>.csv."""
    rows = list(rows)
    path = RESULTS / ("-".join(about["cpu"].lower().split()) + f"-{about['threads']}t.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["op", "shape", "M", "side", "ms", "ours_is_faster_by", "p20", "p80", "floor_ms", *about])
        for row in rows:
            for side, ms in row.ms.items():
                p20, median, p80 = row.ratios.get(side, (1.0, 1.0, 1.0))
                floor = "" if row.floor_ms is None else f"{row.floor_ms:.4f}"
                figures = [f"{ms:.4f}", f"{median:.3f}", f"{p20:.3f}", f"{p80:.3f}", floor]
                writer.writerow([row.op, row.shape, row.M, side, *figures, *about.values()])
    return path
