"""Instructions a weight in the main loops of the Arm kernels, and the cycles that they take at least, predicted.

    PYTHONPATH=.:tests python -m arm.counts

The loops are found in what the compiler made (objdump), by the instructions that they hold. Cycles are
those of the busiest pipes, or of eight instructions a cycle, by the tables of Arm's Software Optimization Guides for
Neoverse V1 and V2 as LLVM's AArch64SchedNeoverseV1.td and V2.td have them; latencies and caches are left out.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

from arm import build

WIDTH, LOAD_PIPES = 8, 3
# The vector pipes 0 to 3 that take an instruction, and micro-ops, on V1 and on V2; what is not named goes to any pipe.
ANY, V01, V02, V13 = (0, 1, 2, 3), (0, 1), (0, 2), (1, 3)
PIPES = {
    "tbl": ((V01, 2), (V01, 1)),
    "bfcvtn": ((V02, 1), (V02, 2)),
    "fcvtn": ((V02, 2), (V02, 2)),
    "fcvtl": ((V02, 2), (V02, 2)),
    **dict.fromkeys(("ushr", "shl", "shll", "sli", "sri", "ushll"), ((V13, 1), (V13, 1))),
    **dict.fromkeys(("str", "stur", "st1"), ((V01, 1), (V01, 1))),
    "stp": ((V01, 1), (V01, 2)),
    "st2": ((V01, 2), (V01, 4)),
    "ld2": ((ANY, 2), (ANY, 2)),
    **dict.fromkeys(("ld1r", "ld1"), ((ANY, 1), (ANY, 1))),
}
LOADS = {"ldr": 1, "ldur": 1, "ldp": 2, "ld1": 1, "ld1r": 1, "ld2": 2}


@dataclass(frozen=True)
class Loop:
    function: str
    instructions: tuple[tuple[str, str], ...]  # mnemonic, operands

    @property
    def count(self) -> Counter[str]:
        return Counter(mnemonic.removesuffix("2") for mnemonic, _ in self.instructions)

    def cycles(self, machine: int) -> float:
        """On V1 (0) or V2 (1)."""
        work: Counter[tuple[int, ...]] = Counter()
        loads = 0
        for mnemonic, operands in self.instructions:
            name = mnemonic.removesuffix("2") if mnemonic not in ("st2", "ld2") else mnemonic
            loads += LOADS.get(name, 0)
            if name in PIPES and re.search(r"\b[vqd]\d", operands):
                pipes, uops = PIPES[name][machine]
                work[pipes] += uops
            elif re.match(r"v\d", operands):
                work[ANY] += 1
        subsets = [set(s) for size in (2, 3, 4) for s in combinations(ANY, size)]
        busiest = max(sum(n for pipes, n in work.items() if set(pipes) <= s) / len(s) for s in subsets)
        return max(busiest, loads / LOAD_PIPES, len(self.instructions) / WIDTH)


def loops(source: str) -> Iterator[Loop]:
    """Those of an object, outer ones too."""
    functions: dict[str, list[tuple[int, str, str]]] = {}
    name = ""
    for line in build.instructions(build.FOLDER / f"{source}.cpp.o"):
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = match[1]
        elif match := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
            functions.setdefault(name, []).append((int(match[1], 16), match[2], match[3]))
    for name, lines in functions.items():
        jumps = [(int(m[1], 16), at) for at, op, args in lines
                 if re.match(r"b\.|b$|cbn?z|tbn?z", op) and (m := re.search(r"([0-9a-f]+) <", args))]  # fmt: skip
        back = [(begin, end) for begin, end in jumps if begin <= end]
        for begin, end in back:
            yield Loop(name, tuple((op, args) for at, op, args in lines if begin <= at <= end))


@dataclass(frozen=True)
class Row:
    what: str
    source: str
    is_it: Callable[[Counter[str]], bool]
    unit: Callable[[Counter[str]], int]  # weights of one turn; of products: weights times rows of x

    def loop(self) -> Loop:
        """The shortest that fits: others have a branch inside that they seldom take."""
        return min(
            (loop for loop in loops(self.source) if self.is_it(loop.count)), key=lambda found: len(found.instructions)
        )

    def cycles(self, machine: int) -> float:
        """A weight."""
        loop = self.loop()
        return loop.cycles(machine) / self.unit(loop.count)


def of_fp32(count: Counter[str]) -> int:
    return 4 * count["tbl"]


def of_bf16(count: Counter[str]) -> int:
    return 8 * count["tbl"]


def gemv(product: str, rows: int, lookups: int) -> Callable[[Counter[str]], bool]:
    return lambda c: c["tbl"] == lookups and c[product] >= rows * lookups and c[product] < (rows + 1) * lookups


ROWS = (
    Row("neon, linear, M = 1", "linear_neon", gemv("fmla", 1, 8), of_fp32),
    Row("neon, linear, M = 4", "linear_neon", gemv("fmla", 4, 8), of_fp32),
    Row("neon, linear, decode", "linear_neon", lambda c: c["tbl"] == 20 and c["fmla"] == 0, lambda c: 64),
    Row("neon, linear_dgrad, decode", "linear_dgrad_neon", lambda c: c["tbl"] == 4 and c["fmla"] == 0, of_fp32),
    Row("neon, products, 5 rows", "linear_neon", lambda c: c["fmla"] == 20 and c["tbl"] == 0, lambda c: 80),
    Row("neon_bf16, linear, M = 1", "linear_neon_bf16", gemv("bfdot", 1, 16), of_bf16),
    Row("neon_bf16, linear, M = 4", "linear_neon_bf16", gemv("bfdot", 4, 16), of_bf16),
    Row("neon_bf16, linear in fp16, M = 1", "linear_gemv_fp16_neon_bf16", gemv("fmlal", 2, 16), of_bf16),
    Row("neon_bf16, linear, decode", "linear_neon_bf16",
        lambda c: c["tbl"] == 4 and c["bfdot"] == c["fmul"] == 0, of_bf16),
    Row("neon_bf16, linear_dgrad, decode", "linear_dgrad_neon_bf16",
        lambda c: c["tbl"] == 8 and c["fmul"] == 0, of_bf16),
    Row("neon_bf16, products, 6 rows", "linear_neon_bf16", lambda c: c["bfmmla"] == 24, lambda c: 16 * c["bfmmla"]),
    Row("neon, dequantize to 16 bits", "dequantize_neon", lambda c: c["tbl"] == 4 and c["fmul"] == 0, of_bf16),
    Row("neon, dequantize to fp32", "dequantize_neon", lambda c: c["tbl"] == 4 and c["fmul"] == 4, of_fp32),
    Row("neon, quantize from bf16", "quantize_neon", lambda c: c["tbl"] == 20 and c["shl"] == 2, lambda c: 16),
)  # fmt: skip


WEIGHTS = 4096 * 4096
TILE_M = 6
# A table of scaled levels serves 64 weights: 4 fmul, 4 bfcvtn and bfcvtn2, 2 uzp. On V1 10 of any pipe, on V2 8 of two.
TABLE_CYCLES = (10 / 4 / 64, 8 / 2 / 64)


def matrix_cycles(op: str, rows: int, machine: int) -> float:
    """Of a 4096x4096 weight and so many rows of x in bf16, by neon_bf16."""
    cycles = {row.what.removeprefix("neon_bf16, "): row.cycles(machine) for row in ROWS}
    if op == "linear" and rows <= 4:
        return WEIGHTS * cycles[f"linear, M = {rows}"]
    tiles = -(-rows // TILE_M)
    products = cycles["products, 6 rows"] * TILE_M * tiles
    return WEIGHTS * (cycles[f"{op}, decode"] + TABLE_CYCLES[machine] + products)


def main() -> None:
    build.build()
    print("| loop                             | weights a turn | instructions a weight | cycles a weight, V1 | V2    |")
    print("| -------------------------------- | -------------- | --------------------- | ------------------- | ----- |")
    for row in ROWS:
        loop, (v1, v2) = row.loop(), map(row.cycles, (0, 1))
        unit = row.unit(loop.count)
        print(f"| {row.what:32} | {unit:<14} | {len(loop.instructions) / unit:<21.2f} | {v1:<19.3f} | {v2:.3f} |")
    print("\n| op           | M   | million cycles, V1 | V2    | of the rate of bfmmla, V1 | V2   |")
    print("| ------------ | --- | ------------------ | ----- | ------------------------- | ---- |")
    for op, rows in (
        ("linear", 1),
        ("linear", 4),
        *((op, m) for op in ("linear", "linear_dgrad") for m in (16, 64, 512)),
    ):
        v1, v2 = (matrix_cycles(op, rows, machine) for machine in (0, 1))
        least = WEIGHTS * rows / (16 * len(ANY))
        print(
            f"| {op:12} | {rows:<3} | {v1 / 1e6:<18.1f} | {v2 / 1e6:<5.1f} | {least / v1:<25.0%} | {least / v2:<4.0%} |"
        )


if __name__ == "__main__":
    main()
