"""The cards that times are predicted for, and what a multiprocessor of each architecture holds."""

import re
from dataclasses import dataclass

from .cuda_report import ARCHITECTURES

# Multiply-adds a cycle and SM that mma.sync reaches in bf16 with fp32 sums where cuBLAS has quicker instructions: sm_90
# 62 % of what wgmma does (published measurements), sm_100 assumed to be as sm_80. Elsewhere cuBLAS uses mma.sync too.
MMA_A_CYCLE = {"sm_90a": 1270, "sm_100": 1024}


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of an SM: the CUDA Programming Guide's table of compute capabilities. All have 65,536 registers."""

    shared: int  # bytes, also of what each block takes for the driver
    threads: int
    blocks: int


DRIVER_SHARED = 1024  # bytes of each block's shared memory
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 << 10, 2048, 32),
    "sm_86": Multiprocessor(100 << 10, 1536, 16),
    "sm_89": Multiprocessor(100 << 10, 1536, 24),
    "sm_90a": Multiprocessor(228 << 10, 2048, 32),
    "sm_100": Multiprocessor(228 << 10, 2048, 32),
    "sm_120": Multiprocessor(100 << 10, 1536, 24),
}


@dataclass(frozen=True)
class Card:
    name: str
    arch: str  # whose machine code it runs, as the report names it
    sms: int
    ghz: float
    copy_gb_s: float  # read and written together
    bf16_gflop_s: float  # cuBLAS
    capability: int  # 10 * major + minor
    l2_mb: float
    source: str = "data sheet"  # of the two rates

    @property
    def multiprocessor(self) -> Multiprocessor:
        return MULTIPROCESSORS[self.arch]

    @property
    def mma_gflop_s(self) -> float:
        """The rate of mma.sync."""
        if self.arch not in MMA_A_CYCLE:
            return self.bf16_gflop_s
        return 2 * MMA_A_CYCLE[self.arch] * self.sms * self.ghz

    @property
    def is_hbm(self) -> bool:
        return self.arch in ("sm_80", "sm_90a", "sm_100")


CARDS = (
    Card("H200", "sm_90a", 132, 1.755, 4300, 788e3, 90, 50, "measured on one"),
    Card("H100", "sm_90a", 132, 1.755, 3350, 989e3, 90, 50),
    Card("A100", "sm_80", 108, 1.41, 2039, 312e3, 80, 40),
    Card("RTX 4090", "sm_89", 128, 2.52, 1008, 165e3, 89, 72),
    Card("RTX 3090", "sm_86", 82, 1.695, 936, 71e3, 86, 6),
    Card("L40S", "sm_89", 142, 2.52, 864, 362e3, 89, 96),
    Card("RTX 5090", "sm_120", 170, 2.407, 1792, 209.5e3, 120, 96),
    Card(
        "GB10", "sm_120", 48, 2.52, 273, 62.5e3, 121, 24
    ),  # clock and tensor rate by its 31 TFLOP/s in fp32, 500 in fp4
)


def card_of(
    name: str, capability: int, sms: int, ghz: float, copy_gb_s: float, bf16_gflop_s: float, l2_mb: float
) -> Card:
    """A present device.

    A device tells its highest clock; a card of CARDS runs at the clock that it keeps under load.
    """
    ghz = next((card.ghz for card in CARDS if re.search(rf"\b{card.name}\b", name)), ghz)
    return Card(
        name, architecture(capability), sms, ghz, copy_gb_s, bf16_gflop_s, capability, l2_mb, "measured in this run"
    )


def architecture(capability: int) -> str:
    """Of the report's, the newest one up to it: "sm_90a"."""
    return "sm_" + max((a for a in ARCHITECTURES if _number(a) <= capability), key=_number)


def _number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))
