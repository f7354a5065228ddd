"""Which kernels a product launches, with how many blocks: what the launchers themselves ask for, on a pretended card.

    python -m benchmarks.gpu.launches            compared with tests/golden/cuda_launches.csv
    python -m benchmarks.gpu.launches --renew    and written there

The bindings and launchers run as on a GPU, compiled for the host executor, which logs each launch and runs none. So
tiles, splits, a persistent grid and a second launch are as the library has them, and no one repeats its rules here.
"""

import argparse
import csv
import ctypes
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import deterministic

from nf4kernels.backends import native

from ..shapes import GPU_SHAPES
from .cards import CARDS, DRIVER_SHARED, MULTIPROCESSORS, Card, architecture
from .cuda_report import ROOT

GOLDEN = ROOT / "tests" / "golden" / "cuda_launches.csv"
FIGURES = (
    "capability",
    "sms",
    "op",
    "N",
    "K",
    "M",
    "kernel",
    "chosen",
    "tile",
    "launch",
    "grid",
    "threads",
    "shared",
    "count",
)
ROWS = (1, 4, 16, 32, 64, 128, 256, 2048)
SMALL_ROWS = 16  # the most of the small kernel
KERNELS = ("small", "tiled", "dequantize_gemm")  # as they are forced
SLICE_BYTES = 24 << 20  # of dequantize + GEMM on a device; tests have smaller ones


@dataclass(frozen=True)
class Launch:
    kernel: str  # "linear_small_kernel<BFloat16, 1, ScaledSums>"
    grid: tuple[int, ...]
    threads: int
    shared: int  # dynamic bytes
    count: int = 1

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Product:
    """A product of bf16 x with a double-quantized NF4 weight, on a card, by one of the kernels that can run it."""

    capability: int
    sms: int
    op: str  # linear, linear_dgrad
    N: int
    K: int
    M: int
    kernel: str


@dataclass(frozen=True)
class Plan:
    launches: tuple[Launch, ...]
    is_chosen: bool  # by csrc/cuda/choose.h, where none is forced
    tile: tuple[int, int] = (0, 0)  # rows of x and columns of the product that a block owns; none of dequantize_gemm


Plans = dict[Product, Plan]


def planned(executor, ops, product: Product) -> Plan:
    """What an op of `executor` launches where the product's kernel is forced.

    Of dequantize_gemm the slices alone are planned, which do not depend on M: torch's product would run on this CPU.
    """
    library = executor.library
    library.nf4kernels_executor_device(product.capability, product.sms)
    executor.set(shared_limit=MULTIPROCESSORS[architecture(product.capability)].shared - DRIVER_SHARED)
    M = 1 if product.kernel == "dequantize_gemm" else product.M
    with _untouched_memory():
        weight = _weight(product.N, product.K)
        x = torch.empty(M, product.N if product.op == "linear_dgrad" else product.K, dtype=torch.bfloat16)
    bias = () if product.op == "linear_dgrad" else (None,)

    def launches(tile: int = -1) -> tuple[Launch, ...]:
        executor.reset()
        forced = native.running_kernel(library, product.kernel, tile)
        with executor.planning(), slices_of_a_device(library), _untouched_memory(), forced, torch.no_grad():
            getattr(ops, product.op)(x, *weight, *bias)
        # closing brackets of templates as cuda_report's names have them
        return tuple(Launch(name.replace("> >", ">>"), *rest) for name, *rest in executor.launches())

    found, tile = launches(), (0, 0)
    if product.kernel == "small":
        tile = SMALL_ROWS, library.nf4kernels_cuda_small_tile_n(ctypes.c_int64(M))
    elif product.kernel == "tiled":
        tiles = native.cuda_tiles(library, product.op)
        rows, n, k = next(map(int, tiles[i].split("x")) for i in range(len(tiles)) if launches(i) == found)
        tile = rows, k if product.op == "linear_dgrad" else n
    return Plan(found, product.kernel == chosen_kernel(library, product), tile)


def chosen_kernel(library: ctypes.CDLL, product: Product) -> str:
    """Where none is forced and nothing was measured."""
    choose = library.nf4kernels_cuda_choose
    choose.argtypes, choose.restype = [ctypes.c_int, *native.CHOOSE_ARGUMENTS, *[ctypes.c_void_p] * 3], ctypes.c_char_p
    results = map(ctypes.byref, (ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()))
    problem = product.op == "linear_dgrad", native.BFLOAT16, product.M, product.N, product.K, 0, True, True
    return choose(-1, *problem, product.capability, product.sms, *results).decode()


@contextmanager
def slices_of_a_device(library: ctypes.CDLL) -> Iterator[None]:
    """dequantize + GEMM has slices as large as on a GPU inside a `with` block."""
    slices = library.nf4kernels_executor_slices
    slices.argtypes, slices.restype = [ctypes.c_int64], ctypes.c_int64
    before = slices(SLICE_BYTES)
    try:
        yield
    finally:
        slices(before)


@contextmanager
def _untouched_memory() -> Iterator[None]:
    """No allocation is filled inside a `with` block, not even where torch is to be deterministic."""
    before, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = before


def _weight(N: int, K: int) -> tuple:
    """As the ops take a weight; its memory is never touched."""
    blocks = N * K // 64
    packed, absmax = torch.empty(N, K // 2, dtype=torch.uint8), torch.empty(N, K // 64, dtype=torch.uint8)
    return packed, absmax, torch.empty(-(-blocks // 256)), torch.zeros(()), torch.zeros(16), torch.zeros(256), N, K, 64


def products(cards: Iterable[Card] = CARDS) -> Iterator[Product]:
    """Every product that times are predicted of, by each kernel that can run it."""
    for capability, sms in dict.fromkeys((card.capability, card.sms) for card in cards):
        for op, (N, K), M in itertools.product(("linear", "linear_dgrad"), GPU_SHAPES, ROWS):
            kernels = KERNELS[1:] if op == "linear_dgrad" or M > SMALL_ROWS else KERNELS
            yield from (Product(capability, sms, op, N, K, M, kernel) for kernel in kernels)


def write_csv(path: Path, plans: Plans) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIGURES)
        for product, plan in plans.items():
            for launch in plan.launches:
                figures = ("x".join(map(str, launch.grid)), launch.threads, launch.shared, launch.count)
                tile = "x".join(map(str, plan.tile))
                writer.writerow((*vars(product).values(), int(plan.is_chosen), tile, launch.kernel, *figures))


def read_csv(path: Path = GOLDEN) -> Plans:
    plans: Plans = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            numbers = {name: int(line[name]) for name in ("capability", "sms", "N", "K", "M")}
            product = Product(**numbers, op=line["op"], kernel=line["kernel"])
            grid = tuple(map(int, line["grid"].split("x")))
            launch = Launch(line["launch"], grid, *(int(line[name]) for name in ("threads", "shared", "count")))
            before = plans[product].launches if product in plans else ()
            rows, columns = map(int, line["tile"].split("x"))
            plans[product] = Plan((*before, launch), line["chosen"] == "1", (rows, columns))
    return plans


def plan(some: Iterable[Product]) -> Plans:
    """By the build for the host executor, which is made first where it is not."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import cuda_backend

    executor, ops = cuda_backend.load(), getattr(torch.ops, cuda_backend.NAMESPACE)
    return {product: planned(executor, ops, product) for product in some}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--renew", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)}")
    args = parser.parse_args()
    now = plan(products())
    if args.renew:
        write_csv(GOLDEN, now)
        print(f"written: {GOLDEN}")
        return
    before = read_csv()
    for product, plan_now in now.items():
        if plan_now != before.get(product):
            print(product, before.get(product), "now", plan_now, sep="\n   ")


if __name__ == "__main__":
    main()
