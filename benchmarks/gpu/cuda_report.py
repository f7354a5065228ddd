"""What nvcc made of every CUDA kernel on every architecture, read out of the machine code; no GPU is needed.

    python -m benchmarks.gpu.cuda_report                    of the built nf4kernels/_cuda.abi3.so
    python -m benchmarks.gpu.cuda_report --compile 80 90a   of csrc/cuda/*.cu, compiled here for these architectures
    python -m benchmarks.gpu.cuda_report --renew            and write tests/golden/cuda_report.csv, the baseline

The main loop of a kernel is the smallest one with its telling instructions: tensor-core products, or loads of weights
past the L1; the longest one where it has neither. Smaller loops in it that have none, tails, are left out; other code
in it that seldom runs is counted. A loop is the range of addresses that a branch jumps back over.
"""

import argparse
import csv
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nf4kernels.model.report import table as aligned

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "nf4kernels" / "_cuda.abi3.so"
BASELINE = ROOT / "tests" / "golden" / "cuda_report.csv"
RENEW = "python -m benchmarks.gpu.cuda_report --renew"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
FRAGMENT_REGISTERS, FRAGMENT_WEIGHTS = 4, 8  # of an m16n8k16 A fragment, a lane: 256 weights over 32 lanes
SHOWN_KINDS = 8  # of instructions in the main loop, by the table


class MissingToolError(Exception):
    """A program of the CUDA toolkit is not on this machine; the message says which and where it was looked for."""


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # "LDG.E.128.CONSTANT"
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """What a load or store moves a thread: 32 where the opcode names no width."""
        found = re.search(r"\.[US]?(8|16|64|128)(?=\.|$)", self.opcode)
        return int(found[1]) if found else 32

    @property
    def shared_words(self) -> int:
        if self.kind == "LDSM":  # .4: so many matrices of 8 x 8, a word a lane each
            return int(self.opcode.rpartition(".")[2]) if self.opcode[-1] in "24" else 1
        return max(1, self.bits // 32) if self.kind in ("LDS", "STS") else 0

    @property
    def is_product(self) -> bool:
        return self.kind in ("HMMA", "HGMMA")

    @property
    def is_streamed_load(self) -> bool:
        return self.kind == "LDG" and ".NA" in self.opcode  # no allocation in the L1

    @property
    def target(self) -> int | None:
        """Where a branch goes, None for any other instruction."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Kernel:
    """One line of the report: a kernel on an architecture."""

    kernel: str  # "dequantize_kernel<BFloat16>"
    arch: str  # "sm_90a"
    nvcc: str  # "13.0"
    registers: int
    shared: int  # static bytes, with the 1024 that the driver keeps on sm_90 and later
    stack: int  # bytes; not zero: arrays or spilled registers in local memory
    spills: int  # loads and stores of local memory
    instructions: int
    loop: int  # instructions in the main loop, 0 for a kernel without one
    weights: int  # weights a thread handles in one pass through it, 0 where nobody knows
    shared_words: int  # of 4 bytes that a thread moves to and from shared memory there
    kinds: str  # "LDS 16 HMMA 8": the instructions there, the most frequent first

    @property
    def per_weight(self) -> float | None:
        """Instructions a thread issues a weight in the main loop."""
        return self.loop / self.weights if self.weights else None

    @property
    def loop_counts(self) -> dict[str, int]:
        words = self.kinds.split()
        return dict(zip(words[::2], map(int, words[1::2])))


# Weights a byte of dequantize's streamed loads: of 4 bytes fp32 takes half, for 16 bytes of output. With tensor cores
# fragments are counted instead. quantize has several loops one after the other: no figure a weight.
DEQUANTIZE_WEIGHTS_A_BYTE = {"float": 1, "BFloat16": 2, "Float16": 2}


def tool(name: str, package: str | None = None) -> str:
    """The path of a program of the CUDA toolkit: from its PyPI package, PATH, CUDA_HOME or /usr/local/cuda."""
    if package is not None:
        try:
            files = importlib.metadata.files(package) or ()
        except importlib.metadata.PackageNotFoundError:
            files = ()
        for file in files:
            if file.name == name and os.access(file.locate(), os.X_OK):
                return str(file.locate())
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{h}/bin" for h in homes if h)]))
    if found is None:
        source = f"PyPI's {package}, " if package else ""
        raise MissingToolError(f"{name} is missing: looked for it in {source}PATH, CUDA_HOME and /usr/local/cuda")
    return found


Loop = Callable[[list[Instruction]], list[Instruction]]  # the instructions of a kernel's main loop


def kernels_of(cubins: Iterable[Path], loop_of: Loop | None = None) -> list[Kernel]:
    """Every kernel of these cubins, by name and architecture; its main loop is `main_loop`'s or another's."""
    cuobjdump = tool("cuobjdump", "nvidia-cuda-cuobjdump")
    environment = os.environ | {"NVDISASM_PATH": str(Path(tool("nvdisasm", "nvidia-cuda-nvdisasm")).parent)}

    def read(cubin: Path) -> list[Kernel]:
        text = output(cuobjdump, "-res-usage", "-sass", str(cubin), env=environment)
        compiler = re.search(rb"Cuda compilation tools, release (\d+\.\d+)", cubin.read_bytes())
        return list(parse(text, compiler[1].decode() if compiler else "unknown", loop_of or main_loop))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sorted(
            (kernel for found in pool.map(read, cubins) for kernel in found),
            key=lambda k: (k.kernel, int(re.sub(r"\D", "", k.arch))),
        )


def kernels_in_library(library: Path = LIBRARY, loop_of: Loop | None = None) -> list[Kernel]:
    cuobjdump = tool("cuobjdump", "nvidia-cuda-cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        output(cuobjdump, "-xelf", "all", str(library.resolve()), cwd=folder)
        return kernels_of(sorted(Path(folder).glob("*.cubin")), loop_of)


def kernels_compiled(architectures: Iterable[str], folder: Path) -> list[Kernel]:
    """Of csrc/cuda/*.cu compiled to cubins in `folder`, one process a file and architecture."""
    from setup import NVCC_FLAGS

    nvcc = tool("nvcc")

    def compile_one(job: tuple[Path, str]) -> Path:
        source, arch = job
        cubin = folder / f"{source.stem}.sm_{arch}.cubin"
        output(nvcc, *NVCC_FLAGS, "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(cubin), source)
        return cubin

    jobs = [(source, arch) for arch in architectures for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return kernels_of(pool.map(compile_one, jobs))


def parse(text: str, nvcc: str, loop_of: Loop | None = None) -> Iterator[Kernel]:
    """The kernels in what `cuobjdump -res-usage -sass` prints of one cubin."""
    arch = re.search(r"code for (sm_\w+)", text)
    usage = dict(re.findall(r"^ Function (\S+):\n\s+(REG:.*)$", text, flags=re.MULTILINE))
    parts = re.split(r"^\s*Function : (\S+)\n", text, flags=re.MULTILINE)[1:]
    symbols = [symbol for symbol in parts[::2] if symbol in usage]
    names = dict(zip(symbols, readable(symbols)))
    for symbol, listing in zip(parts[::2], parts[1::2]):
        if symbol not in usage:
            continue  # a device function that was not inlined: its caller's loop has a CALL
        resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[symbol])}
        code = instructions_in(listing)
        loop = (loop_of or main_loop)(code)
        counts = Counter(i.kind for i in loop)
        yield Kernel(
            names[symbol], arch[1], nvcc, resources["REG"], resources["SHARED"], resources["STACK"],
            sum(i.kind in ("STL", "LDL") for i in code), len(code), len(loop), weights_in(names[symbol], loop),
            sum(i.shared_words for i in loop), " ".join(f"{kind} {count}" for kind, count in counts.most_common()),
        )  # fmt: skip


def readable(symbols: list[str]) -> list[str]:
    """Demangled, without return type, parameters and the namespaces that all kernels are in."""
    if not symbols:
        return []
    names = output("c++filt", input="\n".join(symbols)).splitlines()
    return [_short(name) for name in names]


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|nf4::(cuda::)?", "", name)
    depth = 0
    for i, character in enumerate(name):  # up to the parenthesis that opens the parameters
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and i:
            name = name[:i]
            break
    # a template's name starts with its return type
    return re.sub(r"\((?:int|bool|unsigned int)\)", "", name.removeprefix("void ")).replace("> >", ">>")


def instructions_in(listing: str) -> list[Instruction]:
    """In order of address, without the NOPs that fill the end up."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
    found = (Instruction(int(address, 16), *rest) for address, *rest in re.findall(pattern, listing))
    return [i for i in found if i.kind != "NOP"]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    jumps = [(i.target, i.address) for i in code if i.kind == "BRA"]
    backward = [(to, at) for to, at in jumps if to is not None and to < at]
    loops = [[i for i in code if to <= i.address <= at] for to, at in backward]
    for is_telling in (lambda i: i.is_product, lambda i: i.is_streamed_load):
        telling = [loop for loop in loops if any(map(is_telling, loop))]
        if telling:
            smallest = [loop for loop in telling if not any(_is_inside(other, loop) for other in telling)]
            chosen = max(smallest, key=lambda loop: sum(map(is_telling, loop)))
            tails = [loop for loop in loops if not any(map(is_telling, loop)) and _is_inside(loop, chosen)]
            in_tails = {i.address for tail in tails for i in tail}
            return [i for i in chosen if i.address not in in_tails]
    return max(loops, key=len, default=[])


def _is_inside(inner: list[Instruction], outer: list[Instruction]) -> bool:
    return inner is not outer and outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address


def weights_in(kernel: str, loop: list[Instruction]) -> int:
    """Weights a thread handles in one pass: the weights are the A operand of every product."""
    name, _, arguments = kernel.partition("<")
    if name == "dequantize_kernel":
        a_byte = DEQUANTIZE_WEIGHTS_A_BYTE[re.match(r"\w+", arguments)[0]]
        return round(sum(i.bits for i in loop if i.is_streamed_load) / 8 * a_byte)
    if not name.removeprefix("grouped_").startswith("linear"):
        return 0  # products without a weight
    return FRAGMENT_WEIGHTS * distinct_fragments(loop)


def distinct_fragments(loop: list[Instruction]) -> int:
    """A fragments in the products of `loop`: one whose registers nobody wrote since its last product is the same."""
    count, held = 0, set()
    for i in loop:
        registers = [int(r) for r in re.findall(r"\bR(\d+)", i.operands)]
        if i.kind == "HMMA" and registers[1] not in held:
            count += 1
            held.add(registers[1])
        if registers and i.operands.startswith("R"):  # the first operand is the destination
            wide = 4 if i.kind == "HMMA" else 2 if "WIDE" in i.opcode else max(1, i.bits // 32)
            written = range(registers[0], registers[0] + wide)
            held -= {first for first in held if any(first <= r < first + FRAGMENT_REGISTERS for r in written)}
    return count


def write_csv(path: Path, kernels: Iterable[Kernel]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kernel)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(kernel) for kernel in kernels)


def read_csv(path: Path = BASELINE) -> list[Kernel]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Kernel(**{field.name: field.type(line[field.name]) for field in fields(Kernel)})
            for line in csv.DictReader(file)
        ]


def faults(kernels: Iterable[Kernel]) -> list[str]:
    """Kernels that keep registers or arrays in local memory."""
    return [
        f"{k.kernel} on {k.arch}: {k.stack} bytes of stack, {k.spills} loads and stores of local memory"
        for k in kernels
        if k.stack or k.spills
    ]


def changes(kernels: list[Kernel], baseline: list[Kernel]) -> list[str]:
    """What the baseline does not allow, on the architectures that `kernels` has."""
    architectures = {k.arch for k in kernels}
    now = {(k.kernel, k.arch): k for k in kernels}
    then = {(k.kernel, k.arch): k for k in baseline if k.arch in architectures}
    said = [f"{name} on {arch} is not in the baseline" for name, arch in now.keys() - then.keys()]
    said += [f"{name} on {arch} is in the baseline and not in the library" for name, arch in then.keys() - now.keys()]
    said += [
        f"{name} on {arch}: {now[name, arch].registers} registers, {then[name, arch].registers} in the baseline"
        for name, arch in now.keys() & then.keys()
        if now[name, arch].registers > then[name, arch].registers
    ]
    return sorted(said)


def table(kernels: Iterable[Kernel]) -> str:
    header = ("kernel", "arch", "regs", "shared", "stack", "spills", "instr", "loop", "weights", "instr/weight", "")
    lines = [header]
    for k in kernels:
        per_weight = "" if k.per_weight is None else f"{k.per_weight:.2f}"
        shown = " ".join(k.kinds.split()[: 2 * SHOWN_KINDS])
        figures = (k.registers, k.shared, k.stack, k.spills, k.instructions, k.loop, k.weights or "")
        lines.append((k.kernel, k.arch, *map(str, figures), per_weight, shown))
    return aligned(lines, left=(0, 1, len(header) - 1))


def output(*command, input: str | None = None, cwd: str | None = None, env: dict | None = None) -> str:
    done = subprocess.run(command, input=input, cwd=cwd, env=env, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.cuda_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--compile", nargs="*", metavar="ARCH", help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument("--library", type=Path, default=LIBRARY, help="default: %(default)s")
    parser.add_argument("--renew", action="store_true", help=f"write {BASELINE.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.compile is None:
        kernels = kernels_in_library(args.library)
    else:
        with tempfile.TemporaryDirectory() as folder:
            kernels = kernels_compiled(args.compile or ARCHITECTURES, Path(folder))
    print(table(kernels))
    if args.renew:
        write_csv(BASELINE, kernels)
        print(f"written: {BASELINE}")
    elif BASELINE.exists():
        print("\n".join(changes(kernels, read_csv())))
    spilled = faults(kernels)
    if spilled:
        sys.exit("local memory is used:\n" + "\n".join(spilled))


if __name__ == "__main__":
    main()
