"""What nvcc made of the kernels in bitsandbytes 0.50.2's wheel, by the report that counts ours: bitsandbytes.csv.

    python -m benchmarks.gpu.bitsandbytes_counts      renews it from the installed bitsandbytes

The machine code is that of libbitsandbytes_cuda130.so, which nvcc 13.0 compiled as it does ours.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from . import cuda_report
from .bitsandbytes_kernels import COUNTS, MMA, MMA_WARPS
from .cuda_report import Instruction, Kernel, write_csv

SIMT_WEIGHTS = 32  # that a lane decodes in one pass of the loop
# These count as the 32 x 64 tile, which decodes alike: at every two weights they ask whether a block of 64 begins.
LONG_TILES, FIRST_WEIGHTS = ((32, 128, 128), (32, 256, 128)), 32
OUR_ARCHES = {"sm_90": "sm_90a"} | {f"sm_{number}": f"sm_{number}" for number in (80, 86, 89, 100, 120)}


def count(library: Path) -> Iterator[Kernel]:
    """Its bf16 kernels for products, with the weights that a thread decodes in one pass of the main loop."""
    found = {(k.kernel, k.arch): k for k in cuda_report.kernels_in_library(library, main_loop) if k.arch in OUR_ARCHES}
    for (name, kernel_arch), kernel in found.items():
        arch = OUR_ARCHES[kernel_arch]
        tile = re.fullmatch(r"gemm_4bit_sm80_m16n8k16<__nv_bfloat16, (\d+), (\d+), (\d+)>", name)
        if tile and kernel.loop:  # those that an architecture never launches are empty
            mt, nt, kc = map(int, tile.groups())
            kernel = replace(kernel, arch=arch, weights=nt * kc // (32 * MMA_WARPS))
            first = found[MMA.format(32, 64, 128), kernel_arch]
            yield kernel if (mt, nt, kc) not in LONG_TILES else _as_first(kernel, first, nt)
        elif re.fullmatch(r"gemm_4bit_simt<__nv_bfloat16, \d>", name):
            yield replace(kernel, arch=arch, weights=SIMT_WEIGHTS)


def _as_first(kernel: Kernel, first: Kernel, nt: int) -> Kernel:
    """A warp has 16 rows of x, nt / 4 of the weight; in 8 steps it reads both, after they and x were stored."""
    times = kernel.weights // FIRST_WEIGHTS
    kinds = " ".join(f"{kind} {count * times}" for kind, count in first.loop_counts.items())
    words = 8 * (4 + nt // 16) + 8 + kernel.weights // 2
    return replace(kernel, loop=first.loop * times, shared_words=words, kinds=kinds)


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The smallest loop with a streaming load of weights, and products if there are any.

    Without products, blocks of code with a call are left out: by them a shuffle waits for lanes that went elsewhere,
    and none does.
    """
    loops = [[i for i in code if jump.target <= i.address <= jump.address] for jump in code if _is_backward(jump)]
    has_products = any(i.is_product for i in code)
    whole = [loop for loop in loops if any(".EF" in i.opcode for i in loop)]
    found = min((loop for loop in whole if any(i.is_product for i in loop) == has_products), key=len, default=[])
    if has_products:
        return found
    blocks: list[list[Instruction]] = [[]]
    starts = {i.target for i in code if i.target is not None}
    for i in found:
        if i.address in starts or (blocks[-1] and blocks[-1][-1].kind == "BRA"):
            blocks.append([])
        blocks[-1].append(i)
    return [i for block in blocks if not any(i.kind == "CALL" for i in block) for i in block]


def _is_backward(i: Instruction) -> bool:
    return i.target is not None and i.target < i.address


def main() -> None:
    import bitsandbytes

    if bitsandbytes.__version__ != "0.50.2":
        raise SystemExit(f"the rules here are those of 0.50.2, got bitsandbytes {bitsandbytes.__version__}")
    write_csv(COUNTS, count(Path(bitsandbytes.__file__).with_name("libbitsandbytes_cuda130.so")))
    print(f"written: {COUNTS}")


if __name__ == "__main__":
    main()
