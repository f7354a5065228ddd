"""What is measured of one weight on a GPU: each op at one shape and M, every side checked before it is timed."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

import nf4kernels as nf4
from nf4kernels import reference

from ..checks import assert_as_exact_as_dense, assert_close_to_dense
from ..harness import BNB_DQ, DENSE, OURS, rotate
from .sides import Sides, bnb, bnb_dgrad, bnb_linear, bnb_side, forced_sides, is_ours, triton_side
from .timing import Run
from .weights import Weights

ops = torch.ops.nf4kernels


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
