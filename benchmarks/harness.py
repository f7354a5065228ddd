"""Fair timing: all sides take turns within one run; medians of every time, and of every round's ratio."""

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

import nf4kernels as nf4

ROOT = Path(__file__).parent.parent
OURS = "nf4kernels"
BNB = "bitsandbytes"  # without double quantization
BNB_DQ = "bitsandbytes double-quantized"
INT4 = "torch INT4"
GGML = {"ggml IQ4_NL": "IQ4_NL", "ggml Q4_0": "Q4_0"}  # side -> ggml's type
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DENSE = "dense bf16"
Spread = tuple[float, float, float]  # the 20th percentile, the median, the 80th percentile
LEAST_ROUNDS, MOST_ROUNDS = 5, 25
STAT = Path("/proc/stat")
MOST_OTHERS = 0.1  # cores; threads that wait for one which lost its core make a product many times slower


@dataclass
class Row:
    """One line of the table: what each side took, how much faster ours is, and the floor for ours."""

    op: str
    shape: str  # "4096x4096", or a model's name
    M: int | None
    threads: int
    cache: str  # "in": one weight over and over; "out": over so many that no cache holds them; "" for a model
    ms: dict[str, float]
    ratios: dict[str, Spread] = field(default_factory=dict)  # side -> its time over ours
    floor_ms: float | None = None
    share: Spread | None = None  # the floor over our time
    tokens: int | None = None  # that one call processes, of a model
    peak_mib: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)  # held out, in nats a token, after training
    others: float | None = None  # cores that other processes kept busy meanwhile
    predicted_ms: float | None = None  # ours, by `gpu.predictions`
    dtype: str = "bf16"  # of x, of DTYPES
    isa: str = ""  # that was forced on every side; "" for the machine's best

    @property
    def is_usual(self) -> bool:
        """In bf16, with nothing forced."""
        return self.dtype == "bf16" and not self.isa

    def __str__(self) -> str:
        forced = f" {self.isa or 'best'} {self.dtype}" if self.isa or self.dtype != "bf16" else ""
        what = f"{self.op:16} {self.shape:12} {self.M or '':>4} {self.threads:>2}t {self.cache:3}{forced}"
        share = f"{self.share[1]:5.0%} of floor" if self.share else ""
        ratios = " |".join(f" {r[1]:6.2f}x {side} ({r[0]:.2f}-{r[2]:.2f})" for side, r in self.ratios.items())
        text = f"{what} | {self.ms[OURS]:8.3f} ms {share:14} |{ratios}"
        if is_disturbed(self.others):
            text += f" | DISTURBED: other processes used {self.others:.1f} cores"
        if self.tokens:
            text += "\n" + ", ".join(f"  {side}: {self.tokens / ms * 1e3:.1f} tokens/s" for side, ms in self.ms.items())
        if self.peak_mib:
            text += "\n" + ", ".join(f"  {side}: peak {mib:.0f} MiB" for side, mib in self.peak_mib.items())
        if self.loss:
            text += "\n" + ", ".join(f"  {side}: held-out loss {loss:.3f}" for side, loss in self.loss.items())
        return text


@dataclass(frozen=True)
class Plan:
    """What to measure of one op at one shape."""

    rows: tuple[int, ...] = ()  # values of M
    threads: tuple[int, ...] = ()
    caches: tuple[str, ...] = ("out",)
    seconds: float = 2.0  # a row, all sides together, as long as LEAST_ROUNDS are not longer
    dtype: str = "bf16"  # of DTYPES
    once_after: float = math.inf  # seconds of a peer's call, see `alternate`

    def settings(self) -> Iterator[tuple[int, str]]:
        """Every (threads, cache state), with torch at that number of threads."""
        for threads in self.threads:
            torch.set_num_threads(threads)
            for cache in self.caches:
                yield threads, cache
        torch.set_num_threads(self.threads[0])

    def measure(self, op: str, shape: object, M: int | None, cache: str, sides: dict, floor_ms: float | None) -> Row:
        """The row of these sides, ours first."""
        others = watch_others()
        samples = alternate(sides, self.seconds, warm=cache == "in", once_after=self.once_after)
        row = row_of(samples, op, shape, M, torch.get_num_threads(), cache, floor_ms)
        row.others, row.dtype = others(), self.dtype
        return row


def dense_side(dtype: str) -> str:
    """What the dense peer is called: DENSE for bf16."""
    return f"dense {dtype}"


def watch_others(own: Callable[[], float] = time.process_time) -> Callable[[], float | None]:
    """A function that returns how many cores other processes kept busy since now; None where Linux does not say.

    `own` returns the seconds of CPU time that are not theirs.
    """
    if not STAT.exists():
        return lambda: None

    def busy_elsewhere() -> float:
        user, nice, system, _idle, _waiting, *interrupted = map(
            int, STAT.read_text(encoding="utf-8").split("\n")[0].split()[1:9]
        )
        return (user + nice + system + sum(interrupted)) / os.sysconf("SC_CLK_TCK") - own()

    begin, busy = time.perf_counter(), busy_elsewhere()
    return lambda: max(0.0, busy_elsewhere() - busy) / (time.perf_counter() - begin)


def of_bitsandbytes(row: Row) -> str | None:
    """Its faster layer in that row; None where it was not measured."""
    sides = [side for side in (BNB, BNB_DQ) if side in row.ratios]
    return min(sides, key=lambda side: row.ratios[side][1], default=None)


def is_disturbed(others: float | None) -> bool:
    return others is not None and others > MOST_OTHERS


def spread(values: Sequence[float]) -> Spread:
    return tuple(float(q) for q in np.quantile(values, (0.2, 0.5, 0.8)))


def ratios(others: Sequence[float], ours: Sequence[float]) -> Spread:
    """Round by round, so that what slows a whole round down cancels; one time beside all of ours."""
    others = others if len(others) > 1 else [*others] * len(ours)
    return spread([other / own for other, own in zip(others, ours)])


def row_of(samples: dict[str, list[float]], op, shape, M, threads, cache, floor_ms) -> Row:
    ours = samples[OURS]
    text = "x".join(map(str, shape)) if isinstance(shape, tuple) else shape
    return Row(
        op, text, M, threads, cache,
        ms={side: spread(values)[1] for side, values in samples.items()},
        ratios={side: ratios(values, ours) for side, values in samples.items() if side != OURS},
        floor_ms=floor_ms,
        share=None if floor_ms is None else spread([floor_ms / ms for ms in ours]),
    )  # fmt: skip


def rotate(values: list) -> Callable:
    """A function that returns the values in turn, over and over."""
    position = [0]

    def next_value():
        position[0] = (position[0] + 1) % len(values)
        return values[position[0]]

    return next_value


def alternate(
    sides: dict[str, Callable[[], object]],
    seconds: float,
    warm: bool = False,
    most: int = MOST_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    once_after: float = math.inf,
) -> dict[str, list[float]]:
    """Milliseconds a call of each side in each round.

    A round times every side once, for at least 5 ms, and starts with another side than the round before. There are as
    many rounds as fit `seconds` for all sides together, but LEAST_ROUNDS to `most`. With `warm`, an untimed call
    brings back what the other sides drove out of the caches, where calls are so short that this shows. A peer that
    takes more than `once_after` seconds is timed once.
    """
    calls, warming, once = {}, {}, {}
    for name, run in sides.items():
        start = clock()
        run()
        took = clock() - start
        if took < 0.1:  # else the first call, with whatever it sets up, tells enough
            start = clock()
            run()
            took = clock() - start
        if calls and took > once_after:
            once[name] = [took * 1e3]
            continue
        calls[name], warming[name] = max(1, round(0.005 / max(took, 1e-6))), warm and took < 0.02

    def sample(name: str) -> float:
        run = sides[name]
        if warming[name]:
            run()
        start = clock()
        for _ in range(calls[name]):
            run()
        return (clock() - start) / calls[name] * 1e3

    return take_turns({name: partial(sample, name) for name in calls}, seconds, most, clock) | once


def take_turns(
    samplers: dict[str, Callable[[], float]],
    seconds: float,
    most: int = MOST_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """What each side's sampler returned in each round; rounds as `alternate` has them."""
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = clock() + seconds
    for done in range(most):
        if done >= LEAST_ROUNDS and clock() > deadline:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name]())
    return samples


def commit() -> str:
    """Of this checkout, with "-dirty" where it was changed; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def about(machine: str, device: str, bitsandbytes: str) -> dict[str, str]:
    """What a result must say about where and how it was measured."""
    return {
        "machine": machine,
        "kernels": nf4.backend_info().devices[device][0],
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def installed(package: str) -> str:
    """The package's version, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """`about` this CPU, and the command."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in info.read_text(encoding="utf-8").splitlines()
            if ":" in line
        )
        cpu = f"{fields.get('model name', cpu)} family {fields.get('cpu family')} model {fields.get('model')}"
    waiting = [f"{name}={os.environ[name]} " for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    command = "".join(waiting) + " ".join(["python -m benchmarks", *sys.argv[1:]])
    return about(f"{cpu}, {os.cpu_count()} cores", "cpu", installed("bitsandbytes")) | {"command": command}
