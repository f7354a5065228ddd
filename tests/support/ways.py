"""Every way to run an op: an instruction set of the CPU, the CUDA kernels on the host executor or a GPU, Triton's
kernels under its interpreter or on a GPU; and every kernel of a product that can be forced there.

A test of `tests/contract` with the fixture `way` runs once a way, with `@pytest.mark.every_kernel` once a way and
kernel. Each way knows sizes that fit it: the host executor and the interpreter are a thousand times slower than
compiled code, so that theirs are few, around the tiles of the kernel that runs.
"""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from support import cases
from torch import Tensor

from benchmarks.gpu.reuse import Reuse, reuses
from nf4kernels.backends import native, select

HALVES = (torch.bfloat16, torch.float16)

# op -> kernel that can be forced -> what the name of a launch of it holds.
CPU_DEQUANTIZE_GEMM, CPU_OPS = "dequantize_gemm", ("linear", "linear_dgrad", "grouped_linear", "grouped_linear_dgrad")
CPU_SLICE_BYTES = 40_000  # so that the larger of the shapes have more than one slice
CUDA_KERNELS = {
    "linear": {"small": "linear_small", "tiled": "linear_tiled", "dequantize_gemm": "dequantize", "any": "product_any"},
    "linear_dgrad": {"tiled": "linear_dgrad_tiled", "dequantize_gemm": "dequantize", "any": "product_any"},
    "grouped_linear": {
        "small": "grouped_linear_small", "tiled": "grouped_linear_tiled", "dequantize_gemm": "dequantize_experts",
        "any": "grouped_linear_any",
    },
    "grouped_linear_dgrad": {
        "tiled": "grouped_linear_dgrad_tiled", "dequantize_gemm": "dequantize_experts",
        "any": "grouped_linear_dgrad_any",
    },
}  # fmt: skip
CUDA_DEQUANTIZE_GEMM, TRITON_DEQUANTIZE_GEMM = "dequantize_gemm", "dequantize_gemm"
TRITON_KERNELS = {
    "linear": {"fused": "linear_kernel", "dequantize_gemm": "dequantize_kernel"},
    "linear_dgrad": {"fused": "linear_dgrad_kernel", "dequantize_gemm": "dequantize_kernel"},
    "grouped_linear": {"fused": "grouped_linear_kernel"},
    "grouped_linear_dgrad": {"fused": "grouped_linear_dgrad_kernel"},
}
PRODUCT_KERNELS = ("linear_small", "linear_tiled", "linear_dgrad_tiled", "product_any", "linear_kernel",
                   "linear_dgrad_kernel")  # fmt: skip

# (N, K) around the tiles of the tensor cores' kernels, and those that have none.
CUDA_SHAPES = {
    "linear": ((1, 64), (33, 128), (64, 192), (31, 320), (100, 576), (136, 1088), (257, 64)),
    "linear_dgrad": ((8, 64), (24, 128), (136, 192), (64, 320), (200, 576)),
}
TRITON_SHAPES = {
    "linear": ((1, 64), (65, 128), (100, 576), (33, 96)),
    "linear_dgrad": ((1, 64), (33, 128), (70, 320), (40, 96)),
}
ODD_SHAPES = ((1, 1), (3, 5), (17, 32), (5, 63), (33, 65), (37, 100), (129, 31), (19, 2080))
# M around the tiles: 8 and 16 of small, 32, 64 and 128 of linear's tiled kernel, 16, 64 and 128 of its gradient's.
CUDA_ROWS = {
    "linear": {"small": (1, 2, 7, 8, 9, 16), "tiled": (1, 17, 32, 33, 65, 128, 130), "dequantize_gemm": (1, 65),
               "any": (1, 3, 64, 65)},
    "linear_dgrad": {"tiled": (1, 15, 17, 64, 66, 130), "dequantize_gemm": (1, 65), "any": (1, 65)},
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to run the ops, with the kernel that its products are forced to ("": as chosen)."""

    name: str
    ops: object  # as torch.ops.nf4kernels
    device: str = "cpu"
    kernel: str = ""

    is_compiled = (
        False  # on this CPU: fast enough for every size, but its bits may depend on the alignment of what torch does
    )
    is_reference = False

    def __str__(self) -> str:
        return f"{self.name} {self.kernel}".strip()

    def to(self, tensor: Tensor) -> Tensor:
        """On the device, with the same strides and offset."""
        if self.device == "cpu":
            return tensor
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(self.device)
        moved = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return moved.requires_grad_(tensor.requires_grad)

    def move(self, arguments: tuple) -> list:
        """An op's arguments with their tensors on the device."""
        return [self.to(a) if isinstance(a, Tensor) else a for a in arguments]

    def run(self, op: str, *arguments):
        """The op's result, on the CPU."""
        result = getattr(self.ops, op)(*self.move(arguments))
        return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()

    def running(self, kernel: str) -> AbstractContextManager:
        """Every product by this kernel."""
        raise NotImplementedError

    def schedules(self) -> Iterator[str]:
        """Sets each order in turn in which the work can be done, and then the usual one."""
        yield "again"

    def configurations(self, op: str) -> Iterator[tuple[torch.dtype, AbstractContextManager]]:
        """Every dtype; where a kernel has configurations that any size may run, 16 bits by each of them, forced."""
        return ((dtype, nullcontext()) for dtype in self.dtypes(op))

    def kernel_names(self) -> set[str] | None:
        """The kernels launched since the test began, without template arguments; None where no list is kept."""
        return None

    def assert_ran(self, op: str) -> None:
        """The kernel that is forced ran, and no other product. (Where no list is kept an obstacle is an error.)"""
        names = self.kernel_names()
        if names is None or not self.kernel:
            return
        expected = self.kernels(op)[self.kernel]
        assert any(expected in name for name in names), (self, names)
        self.assert_nothing_else_ran(op)

    def assert_nothing_else_ran(self, op: str) -> None:
        """But for the same kernel of the plain product, to which a grouped one is compared."""
        expected = [self.kernels(name).get(self.kernel, "") for name in (op, op.removeprefix("grouped_"))]
        ran = {product for product in PRODUCT_KERNELS for name in self.kernel_names() or () if product in name}
        others = [product for product in ran if not any(name.endswith(product) for name in expected)]
        assert not self.kernel or not others, (self, others)

    @classmethod
    def kernels(cls, op: str) -> dict[str, str]:
        """What can be forced for the op, and what its launches are called."""
        return {}

    # Sizes.

    def dtypes(self, op: str) -> tuple[torch.dtype, ...]:
        return cases.DTYPES

    def takes(self, op: str, N: int, K: int) -> bool:
        """Whether the forced kernel has this weight."""
        return True

    def fitting(self, op: str, *shapes: tuple[int, int]) -> list[tuple[int, int]]:
        return [shape for shape in shapes if self.takes(op, *shape)]

    def shapes(self, op: str) -> tuple[tuple[int, int], ...]:
        return cases.SHAPES

    def rows(self, op: str) -> tuple[int, ...]:
        return cases.ROWS

    def few_rows(self, op: str) -> tuple[int, ...]:
        """M of different code."""
        return (1, 4, 17)

    def pick(self, every: tuple, few: tuple) -> tuple:
        """`every` where it takes no time, else `few`."""
        return every if self.is_compiled else few


@dataclass(frozen=True)
class CpuWay(Way):
    is_compiled = True

    @property
    def is_reference(self) -> bool:
        return self.name == "reference"

    def kernel_names(self) -> set[str] | None:
        """What multiplied since this was asked last."""
        return None if self.is_reference else cases.LIBRARY.products_that_ran()

    def dtypes(self, op: str) -> tuple[torch.dtype, ...]:
        """True fp32 never goes through torch's GEMM."""
        return HALVES if self.kernel == CPU_DEQUANTIZE_GEMM else cases.DTYPES

    def assert_ran(self, op: str) -> None:
        names = self.kernel_names()
        assert not self.kernel or names, f"{self}: nothing ran"
        self.assert_nothing_else_ran(op, names)

    def assert_nothing_else_ran(self, op: str, names: set[str] | None = None) -> None:
        for name in (self.kernel_names() if names is None else names) or ():
            assert not self.kernel or (name == CPU_DEQUANTIZE_GEMM) == (self.kernel == CPU_DEQUANTIZE_GEMM), (
                self,
                name,
            )

    def schedules(self) -> Iterator[str]:
        """Numbers of threads; the reference multiplies by torch, whose bits depend on it, as its GEMM's on AMX do."""
        threads = torch.get_num_threads()
        is_torchs = self.is_reference or (self.kernel == CPU_DEQUANTIZE_GEMM and torch.cpu._is_amx_tile_supported())
        for count in () if is_torchs else (1, 2, 3, 2):
            torch.set_num_threads(count)
            yield f"{count} threads"
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class CudaWay(Way):
    executor: object = None  # None on a GPU

    @classmethod
    def kernels(cls, op: str) -> dict[str, str]:
        return CUDA_KERNELS.get(op, {})

    @property
    def library(self) -> ctypes.CDLL:
        return select.cuda_library()[0].handle if self.executor is None else self.executor.library

    @contextmanager
    def running(self, kernel: str, tile: int = -1, splits: int = 0) -> Iterator[None]:
        """On the host torch's GEMM stands for cuBLAS; oneDNN's on AMX would read beyond a row of odd length."""
        by_amx = self.executor is not None and kernel == CUDA_DEQUANTIZE_GEMM and torch.cpu._is_amx_tile_supported()
        without_onednn = torch.backends.mkldnn.flags(enabled=False) if by_amx else nullcontext()
        with native.running_kernel(self.library, kernel, tile, splits), without_onednn:
            yield

    def pretend(self, arch: int, multiprocessors: int) -> None:
        """What the choice of kernels sees of the executor's device, until the end of the test."""
        if self.executor is not None:
            self.executor.library.nf4kernels_executor_device(arch, multiprocessors)

    def schedules(self) -> Iterator[str]:
        """Which thread goes on, and when a copy's bytes arrive."""
        if self.executor is None:
            yield "again"
            return
        from executor.executor import SETTINGS, SM_86_SHARED

        for setting in SETTINGS:
            self.executor.set(*setting, shared_limit=SM_86_SHARED)
            yield " ".join(setting)
        self.executor.set(shared_limit=SM_86_SHARED)

    def reuses(self, op: str) -> list[Reuse]:
        """Every tile filling its stages again: scaled sums unsplit in bf16, scaled levels in two parts in fp16."""
        self.pretend(90, 2)
        every = reuses(op, native.cuda_tiles(self.library, op), self.multiprocessors())
        chosen = {(True, torch.bfloat16), (False, torch.float16)}
        return [reuse for reuse in every if (reuse.scales_sums, reuse.dtype) in chosen]

    def multiprocessors(self) -> int:
        return 2 if self.executor is not None else torch.cuda.get_device_properties().multi_processor_count

    @staticmethod
    def layout_of(reuse: Reuse) -> cases.Layout:
        return cases.Layout() if reuse.scales_sums else cases.Layout(16, scale_codebook=None)

    def assert_stages_were_filled_again(self, op: str) -> None:
        """By every block of every tile, of whatever size and however many stages it is by now."""
        if self.executor is None:
            return
        pipelines = self.executor.pipelines()
        tiled = [each for each in pipelines if "tiled" in each.kernel]
        assert len(tiled) == 2 * len(native.cuda_tiles(self.library, op)), pipelines
        assert all(each.fewest >= each.stages + 2 for each in tiled), pipelines
        assert all(each.is_reused for each in pipelines), pipelines

    def launches(self) -> list | None:
        return None if self.executor is None else self.executor.launches()

    def kernel_names(self) -> set[str] | None:
        return None if self.executor is None else {launch.kernel.partition("<")[0] for launch in self.launches()}

    def dtypes(self, op: str) -> tuple[torch.dtype, ...]:
        if not self.kernel:
            return cases.DTYPES
        return HALVES if not (op.startswith("grouped") and self.kernel == CUDA_DEQUANTIZE_GEMM) else HALVES[:1]

    def takes(self, op: str, N: int, K: int) -> bool:
        if self.kernel in ("", "any", CUDA_DEQUANTIZE_GEMM):
            return True
        return K % 64 == 0 and (not op.endswith("dgrad") or N % 8 == 0)

    def shapes(self, op: str) -> tuple[tuple[int, int], ...]:
        return CUDA_SHAPES[op] if self.kernel else ODD_SHAPES

    def rows(self, op: str) -> tuple[int, ...]:
        return CUDA_ROWS[op][self.kernel] if self.kernel else (1, 5, 66)

    def few_rows(self, op: str) -> tuple[int, ...]:
        return self.rows(op)[1:4] if self.kernel else (1, 12, 40) if op == "linear" else (1, 20)


@dataclass(frozen=True)
class TritonWay(Way):
    backend: object = None  # nf4kernels.backends.triton
    launched: list | None = None  # names of kernels; None on a GPU

    @classmethod
    def kernels(cls, op: str) -> dict[str, str]:
        return TRITON_KERNELS.get(op, {})

    def running(self, kernel: str | None, config=None) -> AbstractContextManager:
        return self.backend.choose.forcing(kernel, config)

    def buckets(self, op: str) -> list:
        """(M that a bucket begins at, its configuration) of the table that is in use here."""
        choose = self.backend.choose
        limits = choose.table_on(torch.device(self.device, 0)).configs[op.removeprefix("grouped_")]
        return [(before + 1, config) for before, (_, config) in zip([0, *(most for most, _ in limits)], limits)]

    def configurations(self, op: str) -> Iterator[tuple[torch.dtype, AbstractContextManager]]:
        for _, config in self.buckets(op):
            yield torch.bfloat16, self.running(self.kernel or None, config)
        yield torch.float16, nullcontext()
        yield torch.float32, nullcontext()

    def kernel_names(self) -> set[str] | None:
        return None if self.launched is None else set(self.launched)

    def dtypes(self, op: str) -> tuple[torch.dtype, ...]:
        """In fp16 the interpreter runs what it does in bf16; `test_every_layout` has all three for it."""
        every = HALVES if self.kernel == TRITON_DEQUANTIZE_GEMM else cases.DTYPES
        return every if self.launched is None else tuple(dtype for dtype in every if dtype != torch.float16)

    def shapes(self, op: str) -> tuple[tuple[int, int], ...]:
        return TRITON_SHAPES[op] if self.kernel else ODD_SHAPES

    def rows(self, op: str) -> tuple[int, ...]:
        """The second M of every bucket, of which each has a configuration."""
        if not self.kernel:
            return (1, 17, 66)
        return tuple(first + 1 for first, _ in self.buckets(op)) if self.kernel == "fused" else (2, 66)

    def few_rows(self, op: str) -> tuple[int, ...]:
        return (9,)


# Those of this machine's CPU, and then the others. `test_backends.py` holds a skip for each instruction set that is
# missing here; a GPU that is missing is a skip of each test.
CPU, GPU = cases.IMPLEMENTATIONS, ("cuda", "triton")
NAMES = (*CPU, "executor", "cuda", "interpreter", "triton")
CLASSES = {"executor": CudaWay, "cuda": CudaWay, "interpreter": TritonWay, "triton": TritonWay}


def kind(name: str) -> str:
    """As `@pytest.mark.ways` names it."""
    return "cpu" if name in CPU else name


def params(op: str, kinds: tuple[str, ...], every_kernel: bool) -> list[tuple[str, str]]:
    """(name, kernel) of the ways of these kinds: all, if none is given. "cpu" is without the library the reference."""
    names = [name for name in dict.fromkeys(("reference", *NAMES)) if kind(name) in (kinds or set(map(kind, NAMES)))]
    kernels = {name: CLASSES.get(name, CpuWay).kernels(op) if every_kernel else {} for name in names}
    if (
        every_kernel and cases.LIBRARY is not None and op in CPU_OPS
    ):  # the instruction sets differ there by dequantize alone
        kernels[CPU[0]] = dict.fromkeys(native.CPU_PRODUCTS)
    return [(name, kernel) for name in names for kernel in kernels[name] or ("",)]


@contextmanager
def cpu_way(isa: str, kernel: str = "") -> Iterator[CpuWay]:
    """This instruction set and way to multiply, forced, and proven to have been so all the time; or the reference with
    its checks."""
    if isa == "reference":
        yield CpuWay(isa, SimpleNamespace(**select.REFERENCE))
        return
    way, library = CpuWay(isa, torch.ops.nf4kernels, kernel=kernel), cases.LIBRARY
    slices = library.slices_of(CPU_SLICE_BYTES if kernel == CPU_DEQUANTIZE_GEMM else 0)
    with library.running_isa(isa), library.running_products(kernel), slices:
        library.products_that_ran()
        assert cases.LIBRARY.isa == isa
        yield way
        assert cases.LIBRARY.isa == isa, "something changed the instruction set during the test"
