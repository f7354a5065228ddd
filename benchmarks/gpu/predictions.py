"""The time that each product should take on a card, by counts, beside bitsandbytes' and cuBLAS's counted the same way.

    python -m benchmarks.gpu.predictions                                   of the cards below, as the library chooses
    python -m benchmarks.gpu.predictions --cards H200 --kernels            by each kernel that can run it
    python -m benchmarks.gpu.predictions --before REPORT.csv LAUNCHES.csv  beside those of another version

Counts come from the committed report on the machine code (tests/golden/cuda_report.csv) and the committed launches
(cuda_launches.csv beside it), so that no GPU is needed; kernel_time.py says how they become a time, and what is
assumed. `share` is the time of the bytes at the card's rate of memory, or of the products at cuBLAS's rate where that
is longer, over the predicted time. The peers are flattered: cuBLAS runs at its best rate at every size, bitsandbytes
waits for no scale.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nf4kernels.model.report import table

from ..shapes import GPU_SHAPES
from . import bitsandbytes_kernels, cuda_report, launches
from .cards import CARDS, Card
from .cuda_report import RENEW, Kernel
from .kernel_time import LAUNCH_MS, launch_time
from .launches import ROWS, Plan, Plans, Product
from .work import WEIGHT_BYTES, bitsandbytes_work, dequantize_work, product_work

GEMM = "dequantize_gemm"
TIE = 0.02  # of a ratio, which no count decides


@dataclass(frozen=True)
class Facts:
    """What is counted of one version of the kernels."""

    kernels: dict[tuple[str, str], Kernel]  # by name and architecture
    plans: Plans


@dataclass(frozen=True)
class Prediction:
    ms: float
    bound: str  # what takes longest
    launches: int
    waves: float = 0.0  # of the longest launch
    is_chosen: bool = False


@cache
def committed(report: Path = cuda_report.BASELINE, planned: Path = launches.GOLDEN) -> Facts:
    kernels = {(kernel.kernel, kernel.arch): kernel for kernel in cuda_report.read_csv(report)}
    return Facts(kernels, launches.read_csv(planned))


def uncounted(facts: Facts) -> list[str]:
    """Kernels that are launched and whose machine code the report lacks."""
    counted = {name for name, _ in facts.kernels}
    return sorted({launch.kernel for plan in facts.plans.values() for launch in plan.launches} - counted)


def by_kernel(card: Card, op: str, N: int, K: int, M: int, facts: Facts | None = None) -> dict[str, Prediction]:
    """What each kernel should take, as it is forced; none whose launches are not planned, or whose code not counted."""
    facts, found = facts or committed(), {}
    for name in launches.KERNELS:
        product = Product(card.capability, card.sms, op, N, K, M, name)
        plan = facts.plans.get(product)
        if plan and all((launch.kernel, card.arch) in facts.kernels for launch in plan.launches):
            found[name] = _predict(card, facts, product, plan)
    return found


def _predict(card: Card, facts: Facts, product: Product, plan: Plan) -> Prediction:
    """The launches one after the other; after each dequantized slice comes its product."""
    N, K, M, times = product.N, product.K, product.M, []
    blocks = sum(launch.blocks * launch.count for launch in plan.launches)
    for launch in plan.launches:
        kernel = facts.kernels[launch.kernel, card.arch]
        if product.kernel == GEMM:
            work = dequantize_work(card, N * K * launch.blocks / blocks)
        else:
            work = product_work(kernel, plan, launch, product)
        times += [launch_time(card, kernel, launch, work)] * launch.count
    longest, total = max(times, key=lambda time: time.ms), sum(time.ms for time in times)
    if product.kernel != GEMM:
        return Prediction(total, longest.bound, len(times), longest.waves, plan.is_chosen)
    gemm = _gemm_ms(card, N, K, M, weight_bytes=0) + LAUNCH_MS * len(times)  # a slice is in the L2
    bound = "cuBLAS" if gemm > total else "dequantize"
    return Prediction(total + gemm, bound, 2 * len(times), longest.waves, plan.is_chosen)


def chosen(found: dict[str, Prediction]) -> tuple[str, Prediction] | None:
    return next(((name, prediction) for name, prediction in found.items() if prediction.is_chosen), None)


def predicted_ms(card: Card, op: str, N: int, K: int, M: int | None) -> float | None:
    """Of the kernel that runs; None for an op or a card that nothing is predicted of."""
    if not card.ghz:
        return None
    if op.startswith("dequantize"):
        return N * K * (WEIGHT_BYTES + 2) / card.copy_gb_s / 1e6 + LAUNCH_MS
    found = chosen(by_kernel(card, op, N, K, M)) if M else None
    return found and found[1].ms


def dense_ms(card: Card, N: int, K: int, M: int) -> float:
    """cuBLAS with a bf16 weight."""
    return _gemm_ms(card, N, K, M, weight_bytes=2) + LAUNCH_MS


def _gemm_ms(card: Card, N: int, K: int, M: int, weight_bytes: int) -> float:
    return max(2 * M * N * K / card.bf16_gflop_s, (weight_bytes * N * K + 2 * M * (N + K)) / card.copy_gb_s) / 1e6


def bitsandbytes_ms(card: Card, op: str, N: int, K: int, M: int) -> tuple[float, str]:
    """0.50.2's time, and what bounds it: its fused kernel, or three launches that dequantize, and cuBLAS."""
    fused = bitsandbytes_kernels.fused(card, N, K, M) if op == "linear" else None
    if fused is None:
        nbytes = N * K * (0.5 + 4 / 64 + 2) + N * K / 64 * (1 + 3 * 4)  # the weight, and its scales in two steps
        return nbytes / card.copy_gb_s / 1e6 + 3 * LAUNCH_MS + dense_ms(card, N, K, M), "dequantize + cuBLAS"
    kernel, launch = fused
    time = launch_time(card, kernel, launch, bitsandbytes_work(card, launch, N, K, M))
    return time.ms, time.bound


def share(card: Card, N: int, K: int, M: int, ms: float) -> float:
    """Of the limit: all bytes at the rate of memory, or all products at cuBLAS's rate."""
    memory = (WEIGHT_BYTES * N * K + 2 * M * (N + K)) / card.copy_gb_s
    return max(memory, 2 * M * N * K / card.bf16_gflop_s) / 1e6 / ms


HEADER = ("", "kernel", "ms", "bound", "waves", "launches", "share", "bitsandbytes", "bound", "ratio", "cuBLAS",
          "dequantize + cuBLAS")  # fmt: skip


def rows(card: Card, facts: Facts, before: Facts | None, every_kernel: bool) -> Iterator[tuple[str, ...]]:
    """One a product, and kernel if they are all wanted."""
    for op, (N, K), M in itertools.product(("linear", "linear_dgrad"), GPU_SHAPES, ROWS):
        found = by_kernel(card, op, N, K, M, facts)
        then = chosen(by_kernel(card, op, N, K, M, before)) if before else None
        bnb, bound = bitsandbytes_ms(card, op, N, K, M)
        for name, now in found.items():
            if every_kernel or now.is_chosen:
                yield (
                    f"{op} {N}x{K} M={M}", name, *_before(then, now),
                    f"{now.ms:.4f}", now.bound, f"{now.waves:.2f}", str(now.launches),
                    f"{share(card, N, K, M, now.ms):.0%}", f"{bnb:.4f}", bound, f"{bnb / now.ms:.2f}x",
                    f"{dense_ms(card, N, K, M) / now.ms:.2f}x", f"{found[GEMM].ms / now.ms:.2f}x",
                )  # fmt: skip


def _before(then: tuple[str, Prediction] | None, now: Prediction) -> tuple[str, ...]:
    return (f"{then[1].ms:.4f}", f"{then[1].ms / now.ms:.2f}x") if then else ()


def verdicts(card: Card, facts: Facts) -> Iterator[str]:
    """The goals of docs/design.md, section 9, that are about counts: decode, and no row slower than bitsandbytes."""
    least, (N, K) = 0.65 if card.is_hbm else 0.75, GPU_SHAPES[-1]
    for M in (1, 4, 16):
        _, now = chosen(by_kernel(card, "linear", N, K, M, facts))
        reached = share(card, N, K, M, now.ms)
        yield f"{card.name}: decode {N}x{K} M={M}: {reached:.0%} of memory, goal {least:.0%}: " + (
            "met" if reached >= least else "NOT met"
        )
    yield from _against_cublas(card, facts)
    slower = []
    for op, (N, K), M in itertools.product(("linear", "linear_dgrad"), GPU_SHAPES, ROWS):
        name, now = chosen(by_kernel(card, op, N, K, M, facts))
        ratio = bitsandbytes_ms(card, op, N, K, M)[0] / now.ms
        if ratio < 1 - TIE:
            slower.append(f"{op} {N}x{K} M={M} {name} {ratio:.2f}x")
    total = 2 * len(GPU_SHAPES) * len(ROWS)
    yield f"{card.name}: slower than bitsandbytes by more than {TIE:.0%} in {len(slower)} of {total} products"
    yield from (f"   {line}" for line in slower)


def _against_cublas(card: Card, facts: Facts) -> Iterator[str]:
    for what, ops, all_m, goal in (
        ("training", ("linear", "linear_dgrad"), (2048,), 0.95),
        ("forward, 16 < M < 512", ("linear",), [M for M in ROWS if 16 < M < 512], 1.0),
    ):
        ratios = {}
        for op, (N, K), M in itertools.product(ops, GPU_SHAPES, all_m):
            now = chosen(by_kernel(card, op, N, K, M, facts))[1]
            ratios[f"{op} {N}x{K} M={M}"] = dense_ms(card, N, K, M) / now.ms
        least, met = min(ratios, key=ratios.get), sum(ratio >= goal - TIE for ratio in ratios.values())
        yield (
            f"{card.name}: {what}: {met} of {len(ratios)} products reach {goal:.2f}x of cuBLAS, "
            f"least {ratios[least]:.2f}x ({least})"
        )


def tables(cards: Iterable[Card], facts: Facts, before: Facts | None, every_kernel: bool) -> Iterator[str]:
    header = (*HEADER[:2], *(("before", "gain") if before else ()), *HEADER[2:])
    for card in cards:
        yield (
            f"{card.name}: {card.arch}, {card.sms} SMs at {card.ghz} GHz, {card.copy_gb_s:.0f} GB/s, "
            f"{card.bf16_gflop_s / 1e3:.0f} TFLOP/s bf16 ({card.source})"
        )
        yield table([header, *rows(card, facts, before, every_kernel)], left=(0, 1))
        yield ""
    for card in cards:
        yield from verdicts(card, facts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.predictions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [card.name for card in CARDS]
    parser.add_argument("--cards", nargs="+", choices=names, default=names, metavar="CARD", help=", ".join(names))
    parser.add_argument("--kernels", action="store_true", help="a row for each kernel that can run a product")
    parser.add_argument("--before", nargs=2, type=Path, metavar=("REPORT", "LAUNCHES"), help="of another version")
    args = parser.parse_args()
    before = committed(*args.before) if args.before else None
    for facts in filter(None, (committed(), before)):
        if missing := uncounted(facts):
            parser.error(f"launched, but not in the report on the machine code: {', '.join(missing)}; {RENEW}")
    print(*tables([c for c in CARDS if c.name in args.cards], committed(), before, args.kernels), sep="\n")


if __name__ == "__main__":
    main()
