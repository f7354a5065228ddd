"""The time that each CUDA kernel should take: the longest of moving its bytes, its products and its instructions.

    python -m benchmarks.gpu.predictions       for the cards below, 4096x4096 and 14336x4096

Instructions come from the committed report on the machine code (cuda_report), so no GPU is needed; benchmarks.gpu.run
shows measured beside predicted. Every SM counts as busy from the first cycle to the last, and of latencies the
launch's alone: they explain what a kernel takes longer.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from nf4kernels.model.report import table

from .cuda_report import ARCHITECTURES, Kernel, read_csv

LAUNCH_MS = 0.0025  # of a kernel in a graph, with its first loads; assumed
WEIGHT_BYTES = 0.516  # NF4, block size 64, double-quantized
ISSUE_LANES, ALU_LANES, SHARED_WORDS = 128, 64, 32  # a cycle and SM
ALU = {"LOP3", "SHF", "PRMT", "IADD3", "IADD", "LEA", "ISETP", "VIADD", "SEL", "IMNMX", "VIMNMX", "VIMNMX3", "FSETP"}
ALU |= {"FSEL", "FMNMX", "PLOP3", "I2FP", "F2FP", "MOV"}
# Multiply-adds a cycle and SM that mma.sync reaches in bf16 with fp32 sums where cuBLAS has quicker instructions: sm_90
# 62 % of what wgmma does (published measurements), sm_100 assumed to be as sm_80. Elsewhere cuBLAS uses mma.sync too.
MMA_A_CYCLE = {"sm_90a": 1270, "sm_100": 1024}
MMA_M = 8  # rows of x in one mma


@dataclass(frozen=True)
class Card:
    name: str
    arch: str
    sms: int
    ghz: float
    copy_gb_s: float  # read and written together
    bf16_gflop_s: float  # cuBLAS

    def mma_gflop_s(self) -> float:
        """The rate of mma.sync."""
        if self.arch not in MMA_A_CYCLE:
            return self.bf16_gflop_s
        return 2 * MMA_A_CYCLE[self.arch] * self.sms * self.ghz


CARDS = (
    Card("H200", "sm_90a", 132, 1.755, 4300, 788e3),  # measured on one
    Card("A100", "sm_80", 108, 1.41, 2039, 312e3),  # these two from data sheets
    Card("RTX 4090", "sm_89", 128, 2.52, 1008, 165e3),
)


@dataclass(frozen=True)
class Prediction:
    ms: float
    bound: str  # what takes longest


def card_of(name: str, arch: str, sms: int, ghz: float, copy_gb_s: float, bf16_gflop_s: float) -> Card:
    """A present device; of an architecture that the report lacks, the newest one before it is taken.

    A device tells its highest clock; a card of CARDS runs at the clock that it keeps under load.
    """
    ghz = next((card.ghz for card in CARDS if card.name in name), ghz)
    number = _number(arch)
    known = max((a for a in ARCHITECTURES if _number(a) <= number), key=_number)
    return Card(name, f"sm_{known}", sms, ghz, copy_gb_s, bf16_gflop_s)


def _number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


@cache
def _report() -> tuple[Kernel, ...]:
    return tuple(read_csv())


def kernels(name: str, arch: str) -> list[Kernel]:
    """The bf16 instantiations of `name` whose main loop's weights are known, for blocks of 64 and more."""
    return [
        k for k in _report()
        if k.arch == arch and k.weights and re.match(rf"{name}_kernel<BFloat16\b(?!.*ScaledLevels)", k.kernel)
    ]  # fmt: skip


def decoding(card: Card, kernel: Kernel, weights: float) -> dict[str, float]:
    """Milliseconds that `weights` passages of a weight through the main loop take of each unit of the SMs."""
    alu = sum(count for kind, count in kernel.loop_counts.items() if kind in ALU)
    cycles = {
        "instructions": kernel.loop / ISSUE_LANES,
        "integer pipe": alu / ALU_LANES,
        "shared memory": kernel.shared_words / SHARED_WORDS,
    }
    rate = card.sms * card.ghz * 1e6  # cycles of all SMs a millisecond
    return {unit: weights * count / kernel.weights / rate for unit, count in cycles.items()}


def product(card: Card, kernel: Kernel, N: int, K: int, M: int) -> Prediction:
    """A fused product: every weight is decoded again for so many rows of x as one decoded fragment serves."""
    fragments = kernel.weights / 8
    rows_at_once = MMA_M * max(1, round(kernel.loop_counts["HMMA"] / fragments))
    passes = -(-M // rows_at_once)
    moved = WEIGHT_BYTES * N * K + 2 * M * (N + K)
    units = {
        "bytes": moved / card.copy_gb_s / 1e6,
        "tensor cores": 2 * N * K * passes * rows_at_once / card.mma_gflop_s() / 1e6,
        **decoding(card, kernel, N * K * passes),
    }
    return _longest(units)


def dequantize_gemm(card: Card, N: int, K: int, M: int) -> Prediction:
    """Dequantizes, then multiplies by cuBLAS, which reads a slice from the L2."""
    decode = dequantize(card, N, K).ms
    gemm = max(2 * M * N * K / card.bf16_gflop_s, 2 * M * (N + K) / card.copy_gb_s) / 1e6
    return Prediction(decode + gemm + LAUNCH_MS, "dequantize + GEMM")


def dequantize(card: Card, N: int, K: int) -> Prediction:
    return _moving(card, "dequantize", N * K, WEIGHT_BYTES + 2)


def quantize(card: Card, N: int, K: int) -> Prediction:
    return _moving(card, "quantize", N * K, 2 + 0.5 + 4 / 64)


def _moving(card: Card, name: str, weights: int, bytes_a_weight: float) -> Prediction:
    units = {"bytes": weights * bytes_a_weight / card.copy_gb_s / 1e6}
    for kernel in kernels(name, card.arch):
        units |= decoding(card, kernel, weights)
    return _longest(units)


def _longest(units: dict[str, float]) -> Prediction:
    bound = max(units, key=units.get)
    return Prediction(units[bound] + LAUNCH_MS, bound)


def predictions(card: Card, op: str, N: int, K: int, M: int | None) -> dict[str, Prediction]:
    """By kernel, as it is forced; empty for an op that nothing is predicted of."""
    if op.startswith("dequantize"):
        return {"": dequantize(card, N, K)}
    if op == "quantize":
        return {"": quantize(card, N, K)}
    if op not in ("linear", "linear_dgrad"):
        return {}
    found = {"dequantize_gemm": dequantize_gemm(card, N, K, M)}
    for name in ("small", "tiled"):
        fused = [product(card, k, N, K, M) for k in kernels(f"{op}_{name}", card.arch)]
        if fused and (name != "small" or M <= 16):
            found[name] = min(fused, key=lambda prediction: prediction.ms)
    return found


def predicted_ms(card: Card, op: str, N: int, K: int, M: int | None) -> float | None:
    """Of the fastest kernel; None for an op that nothing is predicted of, or a card whose clock is not known."""
    found = predictions(card, op, N, K, M) if card.ghz else {}
    return min((prediction.ms for prediction in found.values()), default=None)


def rows() -> Iterator[tuple[str, ...]]:
    """One a kernel, shape and M: milliseconds and what takes longest, by card."""
    yield ("", *(card.name for card in CARDS))
    for N, K in ((4096, 4096), (14336, 4096)):
        for op, all_m in (
            ("quantize", (None,)),
            ("dequantize", (None,)),
            ("linear", (1, 8, 16, 64, 256, 1024, 4096)),
            ("linear_dgrad", (16, 64, 256, 1024, 4096)),
        ):
            for M in all_m:
                by_card = {card.name: predictions(card, op, N, K, M) for card in CARDS}
                for kernel in next(iter(by_card.values())):
                    cells = (f"{found[kernel].ms:7.4f} {found[kernel].bound}" for found in by_card.values())
                    yield " ".join(filter(None, (op, kernel, f"{N}x{K}", M and f"M={M}"))), *cells


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table(list(rows()), left=tuple(range(1 + len(CARDS)))))


if __name__ == "__main__":
    main()
