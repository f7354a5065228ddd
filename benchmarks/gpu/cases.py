"""What is measured on a GPU: each op at one shape and M, every side checked before it is timed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

import nf4kernels as nf4
from nf4kernels import reference

from ..checks import assert_as_exact_as_dense, assert_close_to_dense
from ..harness import BNB_DQ, DENSE, OURS, rotate
from ..report.goals import WITHOUT_LORA
from ..shapes import ExpertsShape
from .sides import Sides, bnb, bnb_dgrad, bnb_linear, bnb_side, forced_sides, is_ours, triton_side
from .timing import Cuda, Run

ops = torch.ops.nf4kernels
RANK, SCALING = 16, 2.0
GROUPED = {"grouped linear": "grouped_linear", "grouped dgrad": "grouped_linear_dgrad"}  # row -> op


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

    def in_turn(self) -> tuple[Callable, Callable, Callable]:
        """Functions that return our, the dense and bitsandbytes' copies in turn."""
        return rotate(self.ours), rotate(self.dense), rotate(self.bnb)


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


def measure_quantize(run: Run, w: Weights) -> None:
    code, scale_code, dense, q = w.qweight.code, w.qweight.scale_code, rotate(w.dense), w.qweight

    def both(quantize: Callable, quantize_absmax: Callable) -> Tensor:
        packed, absmax = quantize(dense(), code, 64)
        quantize_absmax(absmax, scale_code, True)
        return packed

    def bitsandbytes() -> Tensor:
        return bnb.functional.quantize_4bit(dense(), quant_type="nf4", compress_statistics=True)[0]

    expected = reference.quantize(w.dense[0], code, 64)[0]
    sides: Sides = {OURS: lambda: both(ops.quantize, ops.quantize_absmax)}
    sides |= triton_side(lambda by_op: both(by_op["quantize"], by_op["quantize_absmax"]))
    sides |= bnb_side(bitsandbytes)

    def check(side: str, packed: Tensor) -> None:
        assert not is_ours(side) or torch.equal(packed, expected), "quantize must give the reference's bytes"

    sides = run.checked(sides, check, f"quantize {w.shape[0]}x{w.shape[1]}")
    if OURS in sides:
        run.add("quantize", w.shape, None, sides, len(w.dense), w.dense[0].nbytes + q.packed.nbytes + q.absmax.nbytes)


def measure_dequantize(run: Run, w: Weights) -> None:
    N, K = w.shape
    out, (ours, _, theirs) = torch.empty_like(w.dense[0]), w.in_turn()
    expected = w.decoded.bfloat16()

    def by_triton(by_op: Mapping[str, Callable]) -> Tensor:
        by_op["dequantize_out"](*ours().op_args(), 0, N, 0, K, out)
        return out

    sides: Sides = {OURS: lambda: nf4.dequantize(ours(), out=out)}
    sides |= triton_side(by_triton)
    sides |= bnb_side(lambda: bnb.functional.dequantize_4bit(*theirs(), out=out))

    def check(side: str, decoded: Tensor) -> None:
        assert not is_ours(side) or torch.equal(decoded, expected), "dequantize must give the reference's bits"

    sides = run.checked(sides, check, f"dequantize {N}x{K}")
    if OURS in sides:
        run.add("dequantize out=", w.shape, None, sides, w.copies, w.nbytes + out.nbytes)


def measure_linear(run: Run, w: Weights, M: int) -> None:
    x = torch.randn(M, w.shape[1], device=run.machine.device, dtype=torch.bfloat16)
    ours, dense, theirs = w.in_turn()
    product = torch.no_grad()(lambda: nf4.linear(x, ours()))
    sides: Sides = {OURS: product, DENSE: lambda: dense_linear(x, dense())}
    sides |= bnb_side(torch.no_grad()(lambda: bnb_linear(x, *theirs())))
    sides |= triton_side(lambda by_op: by_op["linear"](x, *ours().op_args(), None))
    sides |= dict.fromkeys(forced_sides("linear", M), product)
    _measure_product(run, "linear", w, x, w.decoded.T, sides)


def measure_dgrad(run: Run, w: Weights, M: int) -> None:
    dy = torch.randn(M, w.shape[0], device=run.machine.device, dtype=torch.bfloat16)
    ours, dense, theirs = w.in_turn()

    def product() -> Tensor:
        return ops.linear_dgrad(dy, *ours().op_args())

    sides: Sides = {OURS: product, DENSE: lambda: dy @ dense()}
    sides |= bnb_side(lambda: bnb_dgrad(dy, *theirs()))
    sides |= triton_side(lambda by_op: by_op["linear_dgrad"](dy, *ours().op_args()))
    sides |= dict.fromkeys(forced_sides("linear_dgrad", M), product)
    _measure_product(run, "linear_dgrad", w, dy, w.decoded, sides)


def _measure_product(run: Run, op: str, w: Weights, a: Tensor, matrix: Tensor, sides: Sides) -> None:
    (N, K), M = w.shape, len(a)
    what = f"{op} {N}x{K}, M={M}"
    unquantized = sides[DENSE]()

    def check(side: str, product: Tensor) -> None:
        if is_ours(side):
            assert_as_exact_as_dense(product, a, matrix, what)
        assert_close_to_dense({side: product, DENSE: unquantized}, DENSE, what)

    sides = run.checked(sides, check, what)
    if OURS not in sides:
        return
    row = run.add(op, w.shape, M, sides, w.copies, w.nbytes + 2 * M * (K + N), 2 * M * N * K)
    if M >= 2048:
        row.peak_mib = {side: run.machine.temporary_mib(sides[side]) for side in (OURS, BNB_DQ) if side in sides}


def measure_step(run: Run, w: Weights, M: int) -> None:
    """Forward, and backward to x, lora_A and lora_B, of one layer; beside the same without an adapter."""
    N, K = w.shape
    leaf = {"device": run.machine.device, "dtype": torch.bfloat16, "requires_grad": True}
    x, A = torch.randn(M, K, **leaf), torch.empty(RANK, K, **leaf)
    B, dy = torch.empty(N, RANK, **leaf), torch.randn(M, N, **{**leaf, "requires_grad": False})
    with torch.no_grad():
        A.normal_(std=K**-0.5)
        B.normal_(std=0.02)
    ours, dense, theirs = w.in_turn()

    def gradients(y: Tensor, *leaves: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaves, dy)[0]

    def lora_term() -> Tensor:
        return SCALING * dense_linear(dense_linear(x, A), B)

    sides = {
        OURS: lambda: gradients(nf4.lora_linear(x, ours(), A, B, SCALING), x, A, B),
        WITHOUT_LORA: lambda: gradients(nf4.linear(x, ours()), x),
        DENSE: lambda: gradients(dense_linear(x, dense()) + lora_term(), x, A, B),
    }
    sides |= bnb_side(lambda: gradients(bnb_linear(x, *theirs()) + lora_term(), x, A, B))
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
    """Both directions, each token through experts drawn at random, beside torch's grouped product in bf16."""
    counts = w.shape.route(tokens)
    for name, width in zip(GROUPED, (w.shape.K, w.shape.N)):
        a = torch.randn(sum(counts), width, device=run.machine.device, dtype=torch.bfloat16)
        _measure_experts(run, name, w, a, counts)


def _measure_experts(run: Run, name: str, w: ExpertWeights, a: Tensor, counts: list[int]) -> None:
    """bitsandbytes has no product with experts: a loop over those that have rows, which the host knows here."""
    E, N, K, rows = w.shape.experts, w.shape.N, w.shape.K, len(a)
    dgrad = name == "grouped dgrad"
    ends = list(accumulate(counts))
    active = [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts)) if count]
    offsets = torch.tensor(ends, dtype=torch.int32, device=a.device)
    ours, dense = rotate(w.ours), rotate(w.dense)

    def product(function: Callable) -> Tensor:
        return function(a, offsets, *ours().op_args())

    def native() -> Tensor:
        return product(getattr(ops, GROUPED[name]))

    def torchs() -> Tensor:
        weight = dense()
        return torch._grouped_mm(a, weight if dgrad else weight.mT, offs=offsets)

    def bitsandbytes() -> Tensor:
        multiply = bnb_dgrad if dgrad else bnb_linear
        return torch.cat([multiply(a[part], *w.bnb[e]) for e, part in active])

    sides: Sides = {OURS: native, DENSE: torchs}
    sides |= bnb_side(torch.no_grad()(bitsandbytes))
    sides |= triton_side(lambda by_op: product(by_op[GROUPED[name]]))
    sides |= dict.fromkeys(forced_sides(name, rows), native)
    what = f"{name} {E}x{N}x{K}, rows={rows}"
    unquantized = torch.cat([a[part] @ (w.dense[0][e] if dgrad else w.dense[0][e].T) for e, part in active])

    def check(side: str, result: Tensor) -> None:
        if is_ours(side):
            for e, part in active[:: max(1, len(active) // 4)]:
                matrix = w.decoded(e) if dgrad else w.decoded(e).T
                assert_as_exact_as_dense(result[part], a[part], matrix, f"{what}, expert {e}")
        assert_close_to_dense({side: result, DENSE: unquantized}, DENSE, what)

    sides = run.checked(sides, check, what)
    if OURS in sides:
        moved = len(active) * w.nbytes + 2 * rows * (N + K)
        run.add(name, (N, K), rows, sides, len(w.ours), moved, 2 * rows * N * K)
