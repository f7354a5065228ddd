"""The GPU's clock, and a run by it: it checks the sides, times them in turns, and keeps what it found."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from ..harness import BNB_DQ, DENSE, OURS, Row, row_of, take_turns
from ..limits import floor_ms
from ..report.goals import WITHOUT_LORA
from . import predictions
from .cards import Card, card_of
from .reuse import REFUSAL
from .sides import FORCED, TRITON, Sides, forced_ms

SAMPLE_MS = 2.0
LINE = 119  # characters, so that a hundred lines fit in 12,000


class Cuda:
    """The first CUDA device; a sample is a CUDA graph of as many calls as take about SAMPLE_MS."""

    device = torch.device("cuda")

    def __init__(self, forget_graphs: Callable[[], None] = lambda: None) -> None:
        """`forget_graphs` is called where the graphs of a row are gone: each took a slot of arrival counters."""
        self.forget_graphs = forget_graphs
        p = torch.cuda.get_device_properties(0)
        self.name, self.cache_bytes = p.name, p.L2_cache_size
        self.arch = f"sm_{p.major}{p.minor}{'a' if p.major == 9 else ''}"
        self.capability = 10 * p.major + p.minor
        self.sms, self.ghz = p.multi_processor_count, getattr(p, "clock_rate", 0) / 1e6
        self.is_hbm = getattr(p, "memory_bus_width", 4096) > 512
        self.copy_bytes, self.gemm_size = 2 << 30, 8192

    def sampler(self, run: Callable[[], object], copies: int, graph: bool = True) -> Callable[[], float]:
        """A function that times `run` in ms a call, captured in a graph or call by call."""
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        took = (time.perf_counter() - start) * 1e3
        # a short call's eager time is mostly the launch; its graph takes every copy once at least
        calls = max(1, round(SAMPLE_MS / took), copies if took < 0.2 else 1)
        repeated = self._captured(run, calls) if graph else lambda: [run() for _ in range(calls)]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            begin.record()
            repeated()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / calls

        sample()
        return sample

    def _captured(self, run: Callable[[], object], calls: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        return graph.replay

    def temporary_mib(self, run: Callable[[], Tensor]) -> float:
        """What a call takes from torch's allocator at most, its result apart."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return (torch.cuda.max_memory_allocated() - before - result.nbytes) / 2**20

    def between_shapes(self) -> None:
        torch.cuda.empty_cache()


@dataclass
class Run:
    """One benchmark: where, with what limits, until when, and what it found."""

    machine: Cuda
    force: Callable
    deadline: float
    row_seconds: float = 0.3
    clock: Callable[[], float] = time.perf_counter
    keep: Callable[["Run"], object] = lambda run: None  # called after each row
    rows: list[Row] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # wrong results, refused kernels and what was not measured
    wrong: int = 0
    skipped: int = 0
    copy_gb_s: float = 0.0
    bf16_gflop_s: float = 0.0

    def measure_limits(self) -> None:
        device, size = self.machine.device, self.machine.gemm_size
        both = torch.randint(255, (2, self.machine.copy_bytes // 2), dtype=torch.uint8, device=device)
        self.copy_gb_s = both.nbytes / self._fastest(lambda: both[1].copy_(both[0])) / 1e6
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.bf16_gflop_s = 2 * size**3 / self._fastest(lambda: dense_linear(a, b)) / 1e6

    def _fastest(self, run: Callable[[], object]) -> float:
        return min(take_turns({"": self.machine.sampler(run, 1)}, 0.5, clock=self.clock)[""])

    @property
    def card(self) -> Card:
        m = self.machine
        rates = m.ghz, self.copy_gb_s, self.bf16_gflop_s
        return card_of(m.name, m.capability, m.sms, *rates, m.cache_bytes / 1e6)

    def say(self, text: str) -> None:
        self.said.append(text)
        print(text, flush=True)

    def has_time(self) -> bool:
        if self.clock() < self.deadline:
            return True
        self.skipped += 1
        return False

    def add(self, op: str, shape: tuple, M: int | None, sides: Sides, copies: int, nbytes: float, flops=0.0) -> Row:
        """Times the sides, ours first, and prints the row."""
        samplers = {
            side: self._sampler(side, run, copies, f"{op} {shape[0]}x{shape[1]} M={M}") for side, run in sides.items()
        }
        samples = take_turns(samplers, self.row_seconds, clock=self.clock)
        del samplers
        self.machine.forget_graphs()
        floor = floor_ms(nbytes, self.copy_gb_s, flops, self.bf16_gflop_s)
        row = row_of(samples, op, shape, M, 1, "out", floor)
        row.predicted_ms = predictions.predicted_ms(self.card, op, *shape, M)
        self.rows.append(row)
        print(line_of(row), flush=True)
        self.keep(self)
        return row

    def _sampler(self, side: str, run: Callable[[], object], copies: int, what: str) -> Callable[[], float]:
        try:
            sample = self._forced(side, lambda: self.machine.sampler(run, copies))
        except RuntimeError as error:
            self.say(f"{what}, {side}: launches are in its time, it cannot be captured: {_first_line(error)}")
            sample = self._forced(side, lambda: self.machine.sampler(run, copies, graph=False))
        return lambda: self._forced(side, sample)  # what is not in a graph chooses its kernel anew

    def _forced(self, side: str, call: Callable):
        if not side.startswith(FORCED):
            return call()
        with self.force(side.removeprefix(FORCED)):
            return call()

    def checked(self, sides: Sides, check: Callable[[str, Tensor], None], what: str) -> Sides:
        """The sides whose output passes; what the others did wrong is said and they are not timed."""
        right = {}
        for side, run in sides.items():
            try:
                check(side, self._forced(side, run))
            except AssertionError as error:
                self.wrong += 1
                self.say(f"WRONG: {side}: {_first_line(error)}")
                continue
            except Exception as error:  # a forced kernel may refuse a shape, a peer whatever it likes
                self.wrong += side == OURS or (side.startswith(FORCED) and REFUSAL not in str(error))
                self.say(f"{what}, {side}: refused: {_first_line(error)}")
                continue
            right[side] = run
        return right


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or '?'}".splitlines()[0][:100]


def line_of(row: Row) -> str:
    """The row in LINE characters."""
    text = f"{row.op:15.15} {row.shape:>10} {row.M or '':>4} {row.ms[OURS]:8.4f} ms {row.share[1]:4.0%} of floor"
    if row.predicted_ms:
        text += f", pred {row.predicted_ms:8.4f}"
    for side, name in ((DENSE, "dense"), (BNB_DQ, "bnb"), (TRITON, "triton"), (WITHOUT_LORA, "no LoRA")):
        if side in row.ratios:
            text += f" |{row.ratios[side][1]:5.2f}x {name}"
    forced = forced_ms(row)
    if forced:
        best = min(forced, key=forced.get)
        text += f" | {best} {row.ms[OURS] / forced[best]:.2f}x"
    return text[:LINE]
