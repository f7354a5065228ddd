"""What Triton's compiler made of the products' kernels, by the same reading as cuda_report's; no GPU is needed.

    python -m benchmarks.gpu.triton_report             linear and dgrad, grouped too, for sm_80, sm_89 and sm_90
    python -m benchmarks.gpu.triton_report 90 86       for these

A line a bucket of the architecture's table (nf4kernels/backends/tuned/), or of several that have one kernel: bf16,
blocks of 64, double quantization, no LoRA. Kernels write no barriers: Triton's compiler puts one wherever an access to
shared memory may overlap an earlier one that another thread made, so what could race in them is the compiler's, and
neither its interpreter nor this report would show it.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from .cuda_report import (
    ROOT,
    Instruction,
    Kernel,
    faults,
    instructions_in,
    main_loop,
    output,
    table,
    tool,
)

COMPILER = ROOT / "tests" / "support" / "triton_compile.py"
ARCHITECTURES = ("80", "89", "90")


def kernels_compiled(arch: str) -> list[Kernel]:
    """Of the products, compiled for an architecture in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        output(sys.executable, str(COMPILER), f"cuda:{arch}", folder, env=environment)
        rows = json.loads((Path(folder) / "kernels.json").read_text(encoding="utf-8"))
        return [kernel_of(row["name"], row["rows"], Path(folder) / row["cubin"]) for row in rows]


def kernel_of(name: str, rows: int, cubin: Path) -> Kernel:
    """The one kernel of a cubin, each of whose products is with a tile of `rows` rows of x."""
    environment = os.environ | {"NVDISASM_PATH": str(Path(tool("nvdisasm", "nvidia-cuda-nvdisasm")).parent)}
    text = output(tool("cuobjdump", "nvidia-cuda-cuobjdump"), "-res-usage", "-sass", str(cubin), env=environment)
    return parse(text, name, rows)


def parse(text: str, name: str, rows: int) -> Kernel:
    """As cuda_report.parse, of a cubin with one kernel whose name says nothing of its tile."""
    used = {key: int(value) for key, value in re.findall(r"(REG|SHARED|STACK):(\d+)", text)}
    code = instructions_in(text)
    loop = main_loop(code)
    counts = Counter(i.kind for i in loop)
    return Kernel(
        name, re.search(r"code for (sm_\w+)", text)[1], "Triton's", used["REG"], used["SHARED"], used["STACK"],
        sum(i.kind in ("STL", "LDL") for i in code), len(code), len(loop), weights_in(loop, rows),
        sum(i.shared_words for i in loop), " ".join(f"{kind} {count}" for kind, count in counts.most_common()),
    )  # fmt: skip


def weights_in(loop: list[Instruction], rows: int) -> int:
    """Weights a thread handles in one pass: its part of the multiplications, each weight being in `rows` of them."""
    return sum(multiplications(i) for i in loop) // (32 * rows)


def multiplications(product: Instruction) -> int:
    """Of one warp; four warps issue an HGMMA together."""
    if product.kind == "HMMA":
        shape = re.search(r"\.(16)(8)(8|16)\.", product.opcode)
        return 0 if shape is None else int(shape[1]) * int(shape[2]) * int(shape[3])
    if product.kind == "HGMMA":
        m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", product.opcode).groups())
        return m * n * k // 4
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.triton_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("architectures", nargs="*", metavar="ARCH", default=ARCHITECTURES, help="default: 80 89 90")
    kernels = [kernel for arch in parser.parse_args().architectures for kernel in kernels_compiled(arch)]
    print(table(kernels))
    spilled = faults(kernels)
    if spilled:
        sys.exit("local memory is used:\n" + "\n".join(spilled))


if __name__ == "__main__":
    main()
