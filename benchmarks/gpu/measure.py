"""Every op on a GPU beside cuBLAS bf16 and bitsandbytes, and every kernel beside the others; CSV, table and picture.

    python -m benchmarks.gpu.measure --seconds 200

The sides take turns within each round. A sample is a CUDA graph of as many calls as take about 2 ms, over so many
copies of the weight that the L2 cannot hold them. Outputs are checked against an fp64 product before they are timed.
"""

import argparse
import ctypes
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.ops import OPS

from ..checks import assert_as_exact_as_dense, assert_close_to_dense
from ..harness import BNB_DQ, DENSE, OURS, Row, commit, rotate, row_of, take_turns
from ..limits import floor_ms
from ..report import plots
from ..report import tables as report
from ..report.goals import WITHOUT_LORA, goal_rows, gpu_goals
from ..shapes import EXPERTS, GPU_SHAPES, ExpertsShape
from . import predictions as gpu_predictions
from .cuda_report import LIBRARY as CUDA_LIBRARY

try:
    import bitsandbytes as bnb

    BNB_MISSING = None
except ImportError as error:
    bnb, BNB_MISSING = None, f"bitsandbytes is not measured: {error}"

try:
    from nf4kernels.backends import triton as triton_backend

    TRITON_MISSING = None
except ImportError as error:
    triton_backend, TRITON_MISSING = None, f"our Triton kernels are not measured: {error}"

ops = torch.ops.nf4kernels
Sides = dict[str, Callable[[], object]]
SAMPLE_MS = 2.0
REPORT_SECONDS = 30  # kept for the imports before our clock starts, a row under way, the CSV, the table, the pictures
RANK, SCALING = 16, 2.0
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
STEP_ROWS = (512, 2048, 8192)
TELLING_ROWS = (1, 16, 64, 512, 8192)  # measured first
TOKENS = (1, 16, 512, 8192)  # of experts; their rows are as many times the experts of a token
SHOWN_ROWS = {  # the table's; the CSV has all
    "linear": TELLING_ROWS,
    "linear_dgrad": (64, 8192),
    "lora step": (8192,),
    "grouped linear": (8, 128, 65536),
    "grouped dgrad": (65536,),
}
# The kernels that can be forced, and the largest M where each is worth its time: `any` is the plain one.
KERNELS = {"small": 16, "tiled": max(ROWS), "dequantize_gemm": max(ROWS), "any": 64}
FORCED = "kernel "
TRITON = "triton"  # our own kernels in Triton
GROUPED = {"grouped linear": "grouped_linear", "grouped dgrad": "grouped_linear_dgrad"}  # row -> op
REFUSAL = "cannot run this"  # a forced kernel says so of a shape, a dtype or an alignment
LINE = 119  # characters, so that a hundred lines fit in 12,000
SAID_LINES = 8  # of what was wrong or missing, at the end of the summary


class Cuda:
    """The GPU: how a side is timed there, and what the table must say about it."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        p = torch.cuda.get_device_properties(0)
        self.name, self.cache_bytes = p.name, p.L2_cache_size
        self.arch = f"sm_{p.major}{p.minor}{'a' if p.major == 9 else ''}"
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


class Forcing:
    """Makes the CUDA library run the kernel of a name instead of the one that its table would choose."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._force = library.nf4kernels_cuda_force_kernel
        self._force.restype = ctypes.c_char_p  # an error, or null

    @contextmanager
    def __call__(self, kernel: str) -> Iterator[None]:
        """Inside a `with` block."""
        error = self._force(kernel.encode())
        if error is not None:
            raise ValueError(f"{kernel}: {error.decode()}")
        try:
            yield
        finally:
            self._force(None)


@dataclass
class Run:
    """One benchmark: where, with what limits, until when, and what it found."""

    machine: Cuda
    force: Callable
    deadline: float
    row_seconds: float = 0.3
    clock: Callable[[], float] = time.perf_counter
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
    def card(self) -> gpu_predictions.Card:
        m = self.machine
        return gpu_predictions.card_of(m.name, m.arch, m.sms, m.ghz, self.copy_gb_s, self.bf16_gflop_s)

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
        floor = floor_ms(nbytes, self.copy_gb_s, flops, self.bf16_gflop_s)
        row = row_of(samples, op, shape, M, 1, "out", floor)
        row.predicted_ms = gpu_predictions.predicted_ms(self.card, op, *shape, M)
        self.rows.append(row)
        print(line_of(row), flush=True)
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


class Weights:
    """One random weight as every side holds it, in so many copies that the L2 cannot hold one side's."""

    def __init__(self, shape: tuple[int, int], machine: Cuda) -> None:
        self.shape = shape
        dense = torch.randn(*shape, device=machine.device).mul_(0.02).bfloat16()
        self.qweight = nf4.quantize(dense)
        self.nbytes = sum(t.nbytes for t in (self.qweight.packed, self.qweight.absmax))
        self.copies = max(2, -(-3 * machine.cache_bytes // self.nbytes))
        self.decoded = reference.dequantize(*self.qweight.op_args(), 0, shape[0], 0, shape[1], torch.float32)
        self.dense = [dense.clone() for _ in range(max(2, -(-3 * machine.cache_bytes // dense.nbytes)))]
        q = self.qweight
        self.ours = [replace(q, packed=q.packed.clone(), absmax=q.absmax.clone()) for _ in range(self.copies)]
        self.bnb = []
        if bnb is not None:
            packed, state = bnb.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
            self.bnb = [(packed.clone(), state) for _ in range(self.copies)]


class ExpertWeights:
    """The random weights of experts as every side holds them, twice: one side's is more than an L2 holds."""

    def __init__(self, shape: ExpertsShape, machine: Cuda) -> None:
        self.shape = shape
        dense = torch.randn(shape.experts, shape.N, shape.K, device=machine.device, dtype=torch.bfloat16).mul_(0.02)
        first = nf4.quantize_experts(dense)
        self.nbytes = (first.packed.nbytes + first.absmax.nbytes) // len(first)  # of an expert
        self.ours = [first, replace(first, packed=first.packed.clone(), absmax=first.absmax.clone())]
        self.dense = [dense, dense.clone()]
        self.bnb = []
        if bnb is not None:
            self.bnb = [bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in dense]

    def decoded(self, expert: int) -> Tensor:
        q = self.ours[0][expert]
        return reference.dequantize(*q.op_args(), 0, self.shape.N, 0, self.shape.K, torch.float32)


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
            if not run.has_time():
                continue
            weights = Weights(shape, run.machine)
            if stage is telling:
                measure_quantize(run, weights)
                measure_dequantize(run, weights)
            for M in stage:
                measure_linear(run, weights, M)
                measure_dgrad(run, weights, M)
            for M in [M for M in stage if M in STEP_ROWS]:
                measure_step(run, weights, M)
            del weights
            run.machine.between_shapes()
        if stage is telling and run.has_time():
            weights = ExpertWeights(experts, run.machine)
            for count in tokens:
                measure_grouped(run, weights, count)
            del weights
            run.machine.between_shapes()
    if run.skipped:
        run.say(f"out of time: {run.skipped} rows or shapes were not measured")


def forced_sides(op: str, M: int) -> list[str]:
    """The kernels that run `op` and are worth their time at M rows; `small` is linear's alone."""
    return [
        FORCED + kernel for kernel, most in KERNELS.items() if most >= M and (op, kernel) != ("linear_dgrad", "small")
    ]


def triton_side(run: Callable[[Mapping[str, Callable]], object]) -> Sides:
    """The side that `run` is with Triton's functions by op; none without Triton."""
    return {} if triton_backend is None else {TRITON: torch.no_grad()(lambda: run(triton_backend.OPS))}


def measure_quantize(run: Run, w: Weights) -> None:
    if not run.has_time():
        return
    code, scale_code, dense, q = w.qweight.code, w.qweight.scale_code, rotate(w.dense), w.qweight

    def both(quantize: Callable, quantize_absmax: Callable) -> Tensor:
        packed, absmax = quantize(dense(), code, 64)
        quantize_absmax(absmax, scale_code, True)
        return packed

    expected = reference.quantize(w.dense[0], code, 64)[0]
    sides: Sides = {OURS: lambda: both(ops.quantize, ops.quantize_absmax)}
    sides |= triton_side(lambda by_op: both(by_op["quantize"], by_op["quantize_absmax"]))
    if bnb is not None:
        sides[BNB_DQ] = lambda: bnb.functional.quantize_4bit(dense(), quant_type="nf4", compress_statistics=True)[0]

    def check(side: str, packed: Tensor) -> None:
        if side in (OURS, TRITON):
            assert torch.equal(packed, expected), "quantize must give the reference's bytes"

    sides = run.checked(sides, check, f"quantize {w.shape[0]}x{w.shape[1]}")
    if OURS in sides:
        run.add("quantize", w.shape, None, sides, len(w.dense), w.dense[0].nbytes + q.packed.nbytes + q.absmax.nbytes)


def measure_dequantize(run: Run, w: Weights) -> None:
    if not run.has_time():
        return
    N, K = w.shape
    out, ours, packed = torch.empty_like(w.dense[0]), rotate(w.ours), rotate(w.bnb)
    expected = w.decoded.bfloat16()
    sides: Sides = {OURS: lambda: nf4.dequantize(ours(), out=out)}

    def by_triton(by_op: Mapping[str, Callable]) -> Tensor:
        by_op["dequantize_out"](*ours().op_args(), 0, N, 0, K, out)
        return out

    sides |= triton_side(by_triton)
    if bnb is not None:
        sides[BNB_DQ] = lambda: bnb.functional.dequantize_4bit(*packed(), out=out)

    def check(side: str, decoded: Tensor) -> None:
        if side in (OURS, TRITON):
            assert torch.equal(decoded, expected), "dequantize must give the reference's bits"

    sides = run.checked(sides, check, f"dequantize {N}x{K}")
    if OURS in sides:
        run.add("dequantize out=", w.shape, None, sides, w.copies, w.nbytes + out.nbytes)


def measure_linear(run: Run, w: Weights, M: int) -> None:
    if not run.has_time():
        return
    N, K = w.shape
    x = torch.randn(M, K, device=run.machine.device, dtype=torch.bfloat16)
    ours, dense, theirs = rotate(w.ours), rotate(w.dense), rotate(w.bnb)
    product = torch.no_grad()(lambda: nf4.linear(x, ours()))
    sides = {OURS: product, DENSE: lambda: dense_linear(x, dense())}
    if bnb is not None:

        def bitsandbytes() -> Tensor:
            packed, state = theirs()
            return bnb.matmul_4bit(x, packed.t(), quant_state=state)

        sides[BNB_DQ] = torch.no_grad()(bitsandbytes)
    sides |= triton_side(lambda by_op: by_op["linear"](x, *ours().op_args(), None))
    sides |= dict.fromkeys(forced_sides("linear", M), product)
    _measure_product(run, "linear", w, M, x, w.decoded.T, sides, 2 * M * (K + N))


def measure_dgrad(run: Run, w: Weights, M: int) -> None:
    if not run.has_time():
        return
    N, K = w.shape
    dy = torch.randn(M, N, device=run.machine.device, dtype=torch.bfloat16)
    ours, dense, theirs = rotate(w.ours), rotate(w.dense), rotate(w.bnb)

    def product() -> Tensor:
        return ops.linear_dgrad(dy, *ours().op_args())

    sides = {OURS: product, DENSE: lambda: dy @ dense()}
    if bnb is not None:  # what its autograd does
        sides[BNB_DQ] = lambda: dy @ bnb.functional.dequantize_4bit(*theirs())
    sides |= triton_side(lambda by_op: by_op["linear_dgrad"](dy, *ours().op_args()))
    sides |= dict.fromkeys(forced_sides("linear_dgrad", M), product)
    _measure_product(run, "linear_dgrad", w, M, dy, w.decoded, sides, 2 * M * (K + N))


def _measure_product(run: Run, op: str, w: Weights, M: int, a: Tensor, matrix: Tensor, sides: Sides, moved: int):
    N, K = w.shape
    what = f"{op} {N}x{K}, M={M}"
    unquantized = sides[DENSE]()

    def check(side: str, product: Tensor) -> None:
        if side in (OURS, TRITON) or side.startswith(FORCED):
            assert_as_exact_as_dense(product, a, matrix, what)
        assert_close_to_dense({side: product, DENSE: unquantized}, DENSE, what)

    sides = run.checked(sides, check, what)
    if OURS not in sides:
        return
    row = run.add(op, w.shape, M, sides, w.copies, w.nbytes + moved, 2 * M * N * K)
    if M >= 2048:
        row.peak_mib = {side: run.machine.temporary_mib(sides[side]) for side in (OURS, BNB_DQ) if side in sides}


def measure_step(run: Run, w: Weights, M: int) -> None:
    """Forward, and backward to x, lora_A and lora_B, of one layer; beside the same without an adapter."""
    if not run.has_time():
        return
    N, K = w.shape
    leaf = {"device": run.machine.device, "dtype": torch.bfloat16, "requires_grad": True}
    x, A = torch.randn(M, K, **leaf), torch.empty(RANK, K, **leaf)
    B, dy = torch.empty(N, RANK, **leaf), torch.randn(M, N, **{**leaf, "requires_grad": False})
    with torch.no_grad():
        A.normal_(std=K**-0.5)
        B.normal_(std=0.02)
    ours, dense, theirs = rotate(w.ours), rotate(w.dense), rotate(w.bnb)

    def gradients(y: Tensor, *leaves: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaves, dy)[0]

    def low_rank() -> Tensor:
        return SCALING * dense_linear(dense_linear(x, A), B)

    sides = {
        OURS: lambda: gradients(nf4.lora_linear(x, ours(), A, B, SCALING), x, A, B),
        WITHOUT_LORA: lambda: gradients(nf4.linear(x, ours()), x),
        DENSE: lambda: gradients(dense_linear(x, dense()) + low_rank(), x, A, B),
    }
    if bnb is not None:

        def bitsandbytes() -> Tensor:
            packed, state = theirs()
            return gradients(bnb.matmul_4bit(x, packed.t(), quant_state=state) + low_rank(), x, A, B)

        sides[BNB_DQ] = bitsandbytes
    exact_term = SCALING * (dy.double() @ B.detach().double()) @ A.detach().double()

    def check(side: str, dx: Tensor) -> None:
        if side in (OURS, WITHOUT_LORA):
            added = exact_term if side == OURS else 0
            assert_as_exact_as_dense(dx, dy, w.decoded, f"lora step {N}x{K}, M={M}", added)

    sides = run.checked(sides, check, f"lora step {N}x{K}, M={M}")
    if OURS in sides:
        flops = 4 * M * N * K + 6 * M * RANK * (N + K)
        run.add("lora step", w.shape, M, sides, w.copies, 2 * w.nbytes + 4 * M * (N + K), flops)


def measure_grouped(run: Run, w: ExpertWeights, tokens: int) -> None:
    """Both directions, each token through experts drawn at random, beside torch's grouped product in bf16.

    bitsandbytes has no product with experts: a loop over those that have rows, which the host knows for nothing here.
    """
    if not run.has_time():
        return
    E, each, N, K = w.shape.experts, w.shape.top_k, w.shape.N, w.shape.K
    device = run.machine.device
    counts = torch.rand(tokens, E).topk(each).indices.flatten().bincount(minlength=E)
    ends, rows = counts.cumsum(0).tolist(), tokens * each
    active = [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts.tolist())) if count]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    x, dy = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for width in (K, N))
    ours, dense = rotate(w.ours), rotate(w.dense)

    def loop_of_bitsandbytes(a: Tensor, transposed: bool) -> Tensor:
        parts = []
        for e, part in active:
            packed, state = w.bnb[e]
            if transposed:
                parts.append(a[part] @ bnb.functional.dequantize_4bit(packed, state))
            else:
                parts.append(bnb.matmul_4bit(a[part], packed.t(), quant_state=state))
        return torch.cat(parts)

    for (name, op), a, dgrad in zip(GROUPED.items(), (x, dy), (False, True)):
        function = getattr(ops, op)

        def product(function=function, a=a) -> Tensor:
            return function(a, offsets, *ours().op_args())

        def torchs(a=a, dgrad=dgrad) -> Tensor:
            weight = dense()
            return torch._grouped_mm(a, weight if dgrad else weight.mT, offs=offsets)

        sides = {OURS: product, DENSE: torchs}
        if bnb is not None:
            sides[BNB_DQ] = torch.no_grad()(lambda a=a, dgrad=dgrad: loop_of_bitsandbytes(a, dgrad))
        sides |= triton_side(lambda by_op, product=product, op=op: product(by_op[op]))
        sides |= dict.fromkeys((FORCED + kernel for kernel in ("tiled", "small")[: 1 if dgrad else 2]), product)
        what = f"{name} {E}x{N}x{K}, rows={rows}"
        unquantized = torch.cat([a[part] @ (w.dense[0][e] if dgrad else w.dense[0][e].T) for e, part in active])

        def check(side: str, result: Tensor, a=a, dgrad=dgrad, what=what, unquantized=unquantized) -> None:
            if side in (OURS, TRITON) or side.startswith(FORCED):
                for e, part in active[:: max(1, len(active) // 4)]:
                    matrix = w.decoded(e) if dgrad else w.decoded(e).T
                    assert_as_exact_as_dense(result[part], a[part], matrix, f"{what}, expert {e}")
            assert_close_to_dense({side: result, DENSE: unquantized}, DENSE, what)

        sides = run.checked(sides, check, what)
        if OURS in sides:
            moved = len(active) * w.nbytes + 2 * rows * (N + K)
            run.add(name, (N, K), rows, sides, len(w.ours), moved, 2 * rows * N * K)


def line_of(row: Row) -> str:
    """The row in LINE characters."""
    text = f"{row.op:15.15} {row.shape:>10} {row.M or '':>4} {row.ms[OURS]:8.4f} ms {row.share[1]:4.0%} of floor"
    if row.predicted_ms:
        text += f", pred {row.predicted_ms:8.4f}"
    for side, name in ((DENSE, "dense"), (BNB_DQ, "bnb"), (TRITON, "triton"), (WITHOUT_LORA, "no LoRA")):
        if side in row.ratios:
            text += f" |{row.ratios[side][1]:5.2f}x {name}"
    forced = {side.removeprefix(FORCED): ms for side, ms in row.ms.items() if side.startswith(FORCED)}
    if forced:
        best = min(forced, key=forced.get)
        text += f" | {best} {row.ms[OURS] / forced[best]:.2f}x"
    return text[:LINE]


def break_even(rows: Iterable[Row]) -> Iterator[str]:
    """For each op and shape the fastest kernel at each M: "small to 16, tiled to 512, dequantize_gemm"."""
    best: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row in rows:
        forced = {side.removeprefix(FORCED): ms for side, ms in row.ms.items() if side.startswith(FORCED)}
        if forced:
            best.setdefault((row.op, row.shape), []).append((row.M, min(forced, key=forced.get)))
    for (op, shape), winners in best.items():
        winners.sort()
        ranges = [
            f"{kernel} to {M}" for (M, kernel), after in zip(winners, [*winners[1:], (0, "")]) if after[1] != kernel
        ]
        yield f"{op:12} {shape:>10}: {', '.join(ranges)}"


def backend_lines(rows: Iterable[Row], machine: Cuda) -> Iterator[str]:
    """Lines for nf4kernels/backends/measured.csv: the rows of x at which Triton took under 0.95 of native's time.

    By the geometric mean over the shapes; between two M that were measured the choice is the larger one's.
    """
    times: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        op = GROUPED.get(row.op, row.op)
        if op in OPS and row.M is not None and TRITON in row.ratios:
            times.setdefault((op, row.M), []).append(row.ratios[TRITON][1])
    for op in dict.fromkeys(op for op, _ in times):
        of_op = sorted((M, statistics.geometric_mean(ratios)) for (name, M), ratios in times.items() if name == op)
        winners = ["triton" if ratio < 0.95 else "native" for _, ratio in of_op]
        for (M, ratio), winner, after in zip(of_op, winners, [*winners[1:], "native"]):
            if winner != after:
                reason = f"triton {ratio:.2f} of native's time at M={M} on {machine.name}"
                yield f"{machine.arch.rstrip('a')},{op},bfloat16,{M},{winner},{reason}"


def summary(run: Run) -> str:
    """What the run says, in less than a hundred lines of less than 120 characters."""
    m = run.machine
    shown = [row for row in run.rows if row.M is None or row.M in SHOWN_ROWS[row.op]]
    lines = [
        f"{m.name}, {m.arch}, {m.sms} SMs: copy {run.copy_gb_s:.0f} GB/s, dense bf16 {run.bf16_gflop_s / 1e3:.1f} "
        "TFLOP/s, both measured",
        "pred: predicted ms; ratios: how many times faster ours is; last the fastest kernel and our time over its",
        "",
        *map(line_of, sorted(shown, key=lambda r: (r.op, r.shape, r.M or 0))),
        "",
        "fastest kernel at the measured M",
        *break_even(run.rows),
        "",
        "for nf4kernels/backends/measured.csv (no line: the compiled kernels are the faster everywhere)",
        *backend_lines(run.rows, m),
        "",
        report.aligned(report.GOAL_HEADER, goal_rows(run.rows, gpu_goals(0.65 if m.is_hbm else 0.75))),
    ]
    most = max((row for row in run.rows if row.peak_mib), key=lambda row: row.peak_mib[OURS], default=None)
    if most:
        lines.append(f"largest temporary: {most.op} {most.shape} M={most.M}, {most.peak_mib[OURS]:.0f} MiB")
    lines += run.said[:SAID_LINES]
    if len(run.said) > SAID_LINES:
        lines.append(f"and {len(run.said) - SAID_LINES} more such lines above")
    return "\n".join(line[:LINE] for line in "\n".join(lines).splitlines())


def about(run: Run) -> dict[str, str]:
    devices = nf4.backend_info().devices
    return {
        "machine": run.machine.name,
        "kernels": (devices.get("cuda") or devices["cuda:0"])[0],
        "torch": torch.__version__,
        "bitsandbytes": bnb.__version__ if bnb else "missing",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "copy_gb_s": f"{run.copy_gb_s:.0f}",
        "bf16_gflop_s": f"{run.bf16_gflop_s:.0f}",
    }


def write(run: Run, folder: Path = report.RESULTS) -> list[Path]:
    """The CSV and the pictures; pictures only where matplotlib is there."""
    path = folder / (re.sub(r"[^a-z0-9]+", "-", run.machine.name.lower()) + ".csv")
    folder.mkdir(parents=True, exist_ok=True)
    report.write_csv(path, run.rows, about(run))
    shapes = list(dict.fromkeys(row.shape for row in run.rows))[:2]
    try:
        pictures = plots.draw_rows([row for row in run.rows if row.shape in shapes], run.machine.name, path)
    except ImportError as error:
        run.say(f"no picture: {error}")
        pictures = []
    return [path, *pictures]


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
    run = Run(Cuda(), Forcing(ctypes.CDLL(str(CUDA_LIBRARY))), begin + args.seconds - REPORT_SECONDS)
    for missing in filter(None, (BNB_MISSING, TRITON_MISSING)):
        run.say(missing)
    run.measure_limits()
    try:
        measure(run)
    finally:
        print(summary(run), flush=True)
        print(*(f"written: {path}" for path in write(run)), sep="\n", flush=True)
    if run.wrong:
        raise SystemExit(f"{run.wrong} results were wrong")


if __name__ == "__main__":
    main()
