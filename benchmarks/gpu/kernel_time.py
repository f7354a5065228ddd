"""The time of one launch on a card, by counts: its blocks in waves, and in each wave the slowest of what bounds it.

A wave is as many blocks as the card holds at once, by registers, shared memory and threads; the last one is what is
left. It takes the longest of: moving its bytes (HBM or GDDR; the L2), passing its instructions, integer instructions,
shared-memory words and mma's through the SM that has the most blocks, and the chain of one warp, which passes through
the main loop so many times and waits for memory where it has not asked for the next pass's bytes ahead of time.

Counted: instructions, registers, shared memory (cuda_report), blocks (launches). Assumed, and marked so below: what a
launch costs, a load's latency, how soon a warp issues its next instruction, how long blocks of one tile wait for each
other, and the L2's rate.
"""

from dataclasses import dataclass

from .cards import DRIVER_SHARED, Card
from .cuda_report import Kernel
from .launches import Launch

LAUNCH_MS = 0.0025  # of a kernel in a graph, from the end of the one before to its first data; assumed
ARRIVAL_MS = 0.001  # of a launch that adds split sums, from a block's write to the last block's reads of it; assumed
LATENCY_US = 0.7  # of a load that misses the L2 of a busy card; assumed
ISSUE_GAP = 2  # cycles from one instruction of a warp to its next; assumed: of 4 to 6, half are filled
L2_BYTES_A_CYCLE = 32  # and SM; assumed: half of what an L1 can take
ISSUE_LANES, ALU_LANES, SHARED_WORDS = 128, 64, 32  # a cycle and SM
WARP, REGISTERS = 32, 65536
ALU = {"LOP3", "SHF", "PRMT", "IADD3", "IADD", "LEA", "ISETP", "VIADD", "SEL", "IMNMX", "VIMNMX", "VIMNMX3", "FSETP"}
ALU |= {"FSEL", "FMNMX", "PLOP3", "I2FP", "F2FP", "MOV"}
SHUFFLED_WORDS = {"SHFL": 1}  # a lane, through the shared memory's pipe


@dataclass(frozen=True)
class Work:
    """What a launch must do, all blocks together."""

    passages: float  # of a weight through the main loop
    nbytes: float  # of memory
    l2_bytes: float = 0.0  # which the SMs read and write
    multiply_adds: float = 0.0
    table_bytes: float = 0.0  # of shared memory that each block fills before its first product
    is_split: bool = False  # the last block of a tile adds what the others wrote in the L2
    passes_ahead: int = 1  # whose bytes are on their way during one pass; 0: a pass waits for its own


@dataclass(frozen=True)
class Time:
    ms: float  # with the launch
    bound: str  # what takes longest, over all waves
    waves: float  # of blocks, the last one in part
    resident: int  # blocks an SM holds at once


def resident_blocks(card: Card, kernel: Kernel, launch: Launch) -> int:
    """How many blocks an SM holds at once; at least 1, since the kernel was launched."""
    limits, warps = card.multiprocessor, -(-launch.threads // WARP)
    registers = -(-kernel.registers * WARP // 256) * 256 * warps  # a warp gets them in units of 256
    shared = launch.shared + max(kernel.shared, DRIVER_SHARED)
    found = (REGISTERS // registers, limits.shared // shared, limits.threads // (warps * WARP), limits.blocks)
    return max(1, min(found))


def launch_time(card: Card, kernel: Kernel, launch: Launch, work: Work) -> Time:
    blocks = launch.blocks
    resident = resident_blocks(card, kernel, launch)
    slots = resident * card.sms
    full, rest = divmod(blocks, slots)
    totals: dict[str, float] = {}
    longest: dict[str, float] = {}
    for count, b in ((full, slots), (1, rest)):
        if not count or not b:
            continue
        units = _wave(card, kernel, launch, work, b / blocks, -(-b // card.sms))
        bound = max(units, key=units.get)
        longest[bound] = longest.get(bound, 0) + count * units[bound]
        for name, ms in units.items():
            totals[name] = totals.get(name, 0) + count * ms
    starts = (full + bool(rest) - 1) * LATENCY_US / 1e3 / resident  # of later waves; other blocks hide most of it
    table = min(resident, -(-blocks // card.sms)) * work.table_bytes / (4 * SHARED_WORDS) / card.ghz / 1e6
    bound = max(longest, key=longest.get)
    arrival = ARRIVAL_MS if work.is_split else 0.0
    return Time(sum(longest.values()) + starts + table + arrival + LAUNCH_MS, bound, blocks / slots, resident)


def _wave(card: Card, kernel: Kernel, launch: Launch, work: Work, part: float, on_an_sm: int) -> dict[str, float]:
    """Milliseconds that each unit takes for `part` of the work, with `on_an_sm` blocks on the busiest SM."""
    blocks = launch.blocks
    share, cycle = on_an_sm / blocks, 1 / (card.ghz * 1e6)
    loops = work.passages / kernel.weights if kernel.weights else 0.0  # of a thread, all blocks together
    alu = sum(n for kind, n in kernel.loop_counts.items() if kind in ALU)
    words = kernel.shared_words + sum(n * SHUFFLED_WORDS.get(kind, 0) for kind, n in kernel.loop_counts.items())
    passes = loops / (blocks * launch.threads)
    latency, own = LATENCY_US * 1e-3, kernel.loop * ISSUE_GAP * cycle
    chain = latency + own if work.passes_ahead == 0 else max(latency / work.passes_ahead, own)
    mma_a_cycle = card.mma_gflop_s / 2 / card.sms / card.ghz
    return {
        "memory": part * work.nbytes / card.copy_gb_s / 1e6,
        "L2": part * work.l2_bytes / (L2_BYTES_A_CYCLE * card.sms) * cycle,
        "instructions": share * loops * kernel.loop / ISSUE_LANES * cycle,
        "integer pipe": share * loops * alu / ALU_LANES * cycle,
        "shared memory": share * loops * words / SHARED_WORDS * cycle,
        "tensor cores": share * work.multiply_adds / mma_a_cycle * cycle,
        "latency": passes * chain,
    }
