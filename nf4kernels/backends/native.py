"""Loads the compiled libraries, and asks them what they can run here and by which kernels."""

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..codebook import CODEBOOKS
from ..quantized_weight import LEVELS
from .tuned_table import CUDA_PRODUCTS, CudaOp

CPU_LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"
ISA_VARIABLE = "NF4KERNELS_CPU_ISA"
PRODUCTS_VARIABLE = "NF4KERNELS_CPU_PRODUCTS"
CPU_PRODUCTS = ("fused", "dequantize_gemm")  # what can be forced
AMX_BF16, AMX_FP16 = 1, 2  # csrc/cpu/choose.h
TILES_ISA = "amx_bf16"  # whose products are on AMX tiles
NOT_BUILT = f"{CPU_LIBRARY.name} was not built (no C++ compiler at install time?)"
CUDA_LIBRARY = Path(__file__).parent.parent / "_cuda.abi3.so"
CUDA_VARIABLE = "NF4KERNELS_CUDA"
BFLOAT16, FLOAT16, MOST_ROWS = 1, 2, 4096  # csrc/format.h's Dtype; rows of x up to which kernels are asked for
EXPERTS = 8  # that kernels are asked for
# dgrad, dtype, M, N, K, experts, scales_sums, aligned, architecture, multiprocessors
CHOOSE_ARGUMENTS: list = [
    ctypes.c_bool,
    ctypes.c_int32,
    *[ctypes.c_int64] * 4,
    *[ctypes.c_bool] * 2,
    *[ctypes.c_int] * 2,
]
# is_dgrad, dtype, M, code_run, weights, has_tiles, amx, forced, reason
CPU_CHOOSE_ARGUMENTS: list = [
    ctypes.c_bool, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64, ctypes.c_bool,
    *[ctypes.c_int32] * 2, ctypes.POINTER(ctypes.c_char_p),
]  # fmt: skip


class CpuLibrary:
    """The loaded CPU library; loading it registers its ops for CPU tensors."""

    def __init__(self, path: Path) -> None:
        self.reason = "best that this CPU supports"
        torch.ops.load_library(path)
        self._library = ctypes.CDLL(str(path))
        for name in ("isa", "isa_list", "products", "ran", "choose"):
            getattr(self._library, f"nf4kernels_cpu_{name}").restype = ctypes.c_char_p
        for name in ("isa", "products"):
            getattr(self._library, f"nf4kernels_force_cpu_{name}").restype = ctypes.c_char_p
        self._library.nf4kernels_cpu_choose.argtypes = CPU_CHOOSE_ARGUMENTS
        allowed, self.why_no_amx = amx_of_onednn()
        why = ctypes.c_char_p()
        self.amx: int = self._library.nf4kernels_cpu_use_amx(allowed, ctypes.byref(why))
        self.why_no_amx = self.why_no_amx or (why.value or b"").decode()

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._library.nf4kernels_cpu_isa().decode()

    @property
    def isas(self) -> list[str]:
        """The instruction sets that this library has and this machine can run, best first."""
        return self._library.nf4kernels_cpu_isa_list().decode().split()

    def force_isa(self, isa: str) -> None:
        """Run `isa` from now on; ValueError, and nothing changed, for one that is unknown or that this CPU lacks."""
        error = self._library.nf4kernels_force_cpu_isa(isa.encode())
        if error is not None:
            raise ValueError(f"nf4kernels: {ISA_VARIABLE} {error.decode()}")
        self.reason = "forced"

    @contextmanager
    def running_isa(self, isa: str) -> Iterator[None]:
        """Run `isa` inside a `with` block; raises as `force_isa` does."""
        before, reason = self.isa, self.reason
        self.force_isa(isa)
        try:
            yield
        finally:
            self.force_isa(before)
            self.reason = reason

    def force_products(self, name: str) -> None:
        """Multiply by this one of CPU_PRODUCTS from now on, "": as chosen; ValueError for another name."""
        error = self._library.nf4kernels_force_cpu_products(name.encode())
        if error is not None:
            raise ValueError(f"nf4kernels: {PRODUCTS_VARIABLE} {error.decode()}")

    @contextmanager
    def running_products(self, name: str) -> Iterator[None]:
        """Multiply by this one of CPU_PRODUCTS inside a `with` block; raises as `force_products` does."""
        before = self._library.nf4kernels_cpu_products().decode()
        self.force_products(name)
        try:
            yield
        finally:
            self.force_products(before)

    def products_that_ran(self) -> set[str]:
        """The names of choose.h's Products that ran since this was called last."""
        return set(self._library.nf4kernels_cpu_ran().decode().split())

    @contextmanager
    def slices_of(self, count: int) -> Iterator[None]:
        """Slices of so many bytes in dequantize + GEMM inside a `with` block."""
        slices = self._library.nf4kernels_cpu_slices
        slices.argtypes, slices.restype = [ctypes.c_int64], ctypes.c_int64
        before = slices(count)
        try:
            yield
        finally:
            slices(before)

    def choices(self, dtype: int) -> list[tuple[int, str, str]]:
        """(most rows of x, fused or dequantize_gemm, reason) of products with a 4096 x 4096 weight and 16-bit x.

        The last takes any number of rows.
        """
        best, forced = self.isa == self.isas[0], self._library.nf4kernels_cpu_products().decode()
        has_tiles = self.isa == TILES_ISA
        numbers = 4096 * 4096, has_tiles, self.amx if best else 0, ["", *CPU_PRODUCTS].index(forced)
        has_amx = self.amx & {BFLOAT16: AMX_BF16, FLOAT16: AMX_FP16}[dtype]
        why_fused = self.why_no_amx
        if not best:
            why_fused = f"{self.isa} is forced, which has no AMX"
        elif has_tiles and dtype == BFLOAT16:
            why_fused = "on AMX tiles from 4 rows on"
        elif has_amx:
            why_fused = "few rows"
        why = ctypes.c_char_p()
        found: list[tuple[int, str, str]] = []
        for rows in range(1, MOST_ROWS + 1):
            name = self._library.nf4kernels_cpu_choose(False, dtype, rows, 64, *numbers, why)
            is_fused = name != b"dequantize_gemm"
            reason = "forced" if forced else why_fused if is_fused else (why.value or b"").decode()
            if found and found[-1][2] == reason:
                found.pop()
            found.append((rows, CPU_PRODUCTS[not is_fused], reason))
        return found


def amx_of_onednn() -> tuple[int, str]:
    """The AMX products, AMX_BF16 and AMX_FP16, that torch's build and oneDNN's variable allow; why not all of them.

    What the CPU has is not asked.
    """
    variable = next((name for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ), None)
    limit = "DEFAULT" if variable is None else os.environ[variable].upper()
    if not torch.backends.mkldnn.is_available():
        return 0, "torch has no oneDNN"
    if limit in ("DEFAULT", "ALL") or "AMX_FP16" in limit:
        return AMX_BF16 | AMX_FP16, ""
    return (AMX_BF16 if "AMX" in limit else 0), f"{variable} is {limit}"


def load_cpu() -> CpuLibrary | None:
    """The CPU library, None where it was not built.

    Raises:
        ValueError: NF4KERNELS_CPU_ISA or NF4KERNELS_CPU_PRODUCTS names what cannot be run here. OSError: the library
            does not load.
    """
    forced, products = os.environ.get(ISA_VARIABLE), os.environ.get(PRODUCTS_VARIABLE)
    if not CPU_LIBRARY.exists():
        for variable, value in ((ISA_VARIABLE, forced), (PRODUCTS_VARIABLE, products)):
            if value is not None:
                raise ValueError(f"nf4kernels: {variable} must be unset where {NOT_BUILT}, got {value}")
        return None
    library = CpuLibrary(CPU_LIBRARY)
    if products is not None:
        if products not in CPU_PRODUCTS:
            raise ValueError(f"nf4kernels: {PRODUCTS_VARIABLE} must be one of {' '.join(CPU_PRODUCTS)}, got {products}")
        library.force_products(products)
    if forced is not None:
        library.force_isa(forced)
        library.reason = f"forced by {ISA_VARIABLE}"
    return library


@contextmanager
def running_kernel(library: ctypes.CDLL, name: str, tile: int = -1, splits: int = 0) -> Iterator[None]:
    """Run every CUDA product by this kernel (any, small, tiled, dequantize_gemm) inside a `with` block.

    Of tiled by the tile of this number, in the order of `cuda_tiles` (-1: as chosen), small and tiled in so many splits
    (0: as chosen). A product that cannot run so is a RuntimeError that says why. ValueError for an unknown name.
    """
    force = library.nf4kernels_cuda_force_kernel
    force.argtypes, force.restype = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int], ctypes.c_char_p
    error = force(name.encode(), tile, splits)
    if error is not None:
        raise ValueError(f"nf4kernels: a CUDA kernel {error.decode()}, got {name}, tile {tile}, {splits} splits")
    try:
        yield
    finally:
        force(None, -1, 0)


def cuda_tiles(library: ctypes.CDLL, op: str) -> list[str]:
    """The tiles of linear's or linear_dgrad's tiled kernel and of its grouped form, M x N x K: ["32x64x128", ...]."""
    tiles = library.nf4kernels_cuda_tiles
    tiles.argtypes, tiles.restype = [ctypes.c_bool], ctypes.c_char_p
    return tiles(op.endswith("dgrad")).decode().split()


def check_tiles(library: ctypes.CDLL, ops: Mapping[str, CudaOp]) -> None:
    """ValueError as of `tune_cuda`."""
    for op, own in ops.items():
        tiles, found = cuda_tiles(library, op), [tile.tile for tile in own.tiles]
        if found != tiles:
            raise ValueError(f"must have the tiles {' '.join(tiles)} of this library's {op}, got {' '.join(found)}")


def tune_cuda(library: ctypes.CDLL, device: int, ops: Mapping[str, CudaOp], why: str) -> None:
    """A device's products are chosen by what was measured of these ops, the others as predicted; of none: all are.

    ValueError where the tiles of an op are not the library's, with a message that goes on from the table's name.
    """
    check_tiles(library, ops)
    tune = library.nf4kernels_cuda_tune
    tune.argtypes, tune.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p], ctypes.c_char_p
    numbers: list[int] = []
    for op in CUDA_PRODUCTS:
        tiles, own = cuda_tiles(library, op), ops.get(op)
        numbers += [0] * (3 + 3 * len(tiles)) if own is None else own.numbers()
    array = (ctypes.c_int64 * len(numbers))(*numbers)
    error = tune(device, array if ops else None, len(numbers), why.encode())
    if error is not None:
        raise ValueError(error.decode())


def register_cuda_ops(library: ctypes.CDLL, namespace: str, key: str) -> None:
    """The ops of `namespace` are those of the CUDA library, or of its build for the tests, for this dispatch key."""
    register = library.nf4kernels_cuda_register
    register.argtypes, register.restype = [ctypes.c_char_p, ctypes.c_char_p], None
    register(namespace.encode(), key.encode())


def know_codebooks(library: ctypes.CDLL) -> None:
    """Tell the CUDA library of the codebooks that have a name: their products are the most exact."""
    know = library.nf4kernels_cuda_know_codebook
    know.argtypes, know.restype = [ctypes.c_void_p], ctypes.c_bool
    for name, code in CODEBOOKS.items():
        if code.numel() == LEVELS and not know(code.data_ptr()):
            raise RuntimeError(f"nf4kernels: the CUDA library has no room for another codebook, {name}")


class CudaLibrary:
    """The loaded CUDA library; loading it registers no op and touches no device."""

    def __init__(self, path: Path) -> None:
        self.handle = library = ctypes.CDLL(str(path))
        know_codebooks(library)
        library.nf4kernels_cuda_architectures.restype = ctypes.c_char_p
        self.architectures: list[str] = library.nf4kernels_cuda_architectures().decode().split()
        self.version: int = library.nf4kernels_cuda_version()
        self._driver_version = library.nf4kernels_cuda_driver_version

    def register(self, namespace: str = "nf4kernels") -> None:
        """The ops of this namespace are the library's for CUDA tensors from now on; once for a namespace."""
        register_cuda_ops(self.handle, namespace, "CUDA")

    def choices(
        self, op: str, device: int, capability: tuple[int, int], multiprocessors: int
    ) -> list[tuple[int, str, str]]:
        """(most rows of x, kernel, reason) of 16-bit products with a 4096 x 4096 weight; the last takes any number.

        The rows of experts are those of each.
        """
        found: list[tuple[int, str, str]] = []
        experts = EXPERTS if op.startswith("grouped_") else 0
        for rows in range(1, MOST_ROWS + 1):
            problem = op.endswith("dgrad"), BFLOAT16, rows * max(experts, 1), 4096, 4096, experts, True, True
            kernel, _, _, reason = self.choice(device, *problem, 10 * capability[0] + capability[1], multiprocessors)
            if found and found[-1][1] == kernel:
                found.pop()
            found.append((rows, kernel, reason))
        return found

    def choice(self, device: int, *problem) -> tuple[str, int, int, str]:
        """(kernel, its tile, splits, why) of a product, with the arguments of CHOOSE_ARGUMENTS."""
        choose = self.handle.nf4kernels_cuda_choose
        choose.argtypes, choose.restype = [ctypes.c_int, *CHOOSE_ARGUMENTS, *[ctypes.c_void_p] * 3], ctypes.c_char_p
        tile, splits, reason = ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()
        kernel = choose(device, *problem, *map(ctypes.byref, (tile, splits, reason)))
        return kernel.decode(), tile.value, splits.value, (reason.value or b"").decode()

    @property
    def driver_version(self) -> int:
        """The newest CUDA that the driver knows, as `version`; 0 without a driver."""
        return self._driver_version()

    def forget_graphs(self) -> None:
        """Nothing runs, and no CUDA graph of before is launched any more: its arrival counters may be given again.

        A measurement has more graphs than the library has counters for (csrc/bindings/arrival_slots.h).
        """
        self.handle.nf4kernels_cuda_forget_streams()

    def tile_cycles(self, *product) -> float:
        """What csrc/cuda/tiles.h predicts; the arguments but the last are those of nf4kernels_cuda_tile_cycles."""
        predict = self.handle.nf4kernels_cuda_tile_cycles
        sizes, numbers = [ctypes.c_int64] * 3, [ctypes.c_int] * 4
        predict.argtypes = [ctypes.c_bool, ctypes.c_bool, *sizes, *numbers, ctypes.c_void_p]
        predict.restype = ctypes.c_float
        return float(predict(*product, ctypes.byref(ctypes.c_int(0))))

    def code_for(self, capability: tuple[int, int]) -> tuple[str | None, str]:
        """What a device of this compute capability runs, as "sm_86", or None; and why, where there is more to say."""
        device, driver = "sm_{}{}".format(*capability), self.driver_version
        if capability < (8, 0):
            return None, f"this device is {device}, and the kernels need sm_80"
        if driver // 1000 < self.version // 1000:
            made, known = version_name(self.version), version_name(driver)
            return None, f"the library was built with CUDA {made}, the driver is for CUDA {known}"
        code = machine_code_for(capability, self.architectures)
        if code is not None:
            return code, "" if code.rstrip("af") == device else f"{device} runs {code}'s code"
        ptx = ptx_for(capability, self.architectures)
        if ptx is None:
            return None, f"this device is {device}, and the library has code for {' '.join(self.architectures)}"
        if driver < self.version:
            made, known = version_name(self.version), version_name(driver)
            return None, f"{device} needs the library's PTX, of CUDA {made}, and the driver compiles CUDA {known}'s"
        return f"{ptx} by PTX", f"the driver compiles it for {device} when it is first needed"


def version_name(version: int) -> str:
    """1000 * major + 10 * minor, CUDA's own way to number its versions, as "12.4"."""
    return f"{version // 1000}.{version % 1000 // 10}"


# GPUs on one chip with the CPU, Orin and Thor as CUDA 12 calls it: they run no code of other GPUs of their major
# version, and those not theirs (torch/cuda/__init__.py, DEVICE_REQUIREMENT). CUDA 13's name for Thor is 11.0.
ON_CHIP = ((8, 7), (10, 1))


def machine_code_for(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Which of these ("86", "90a", "100f") a device runs as it is, as "sm_86"; None if none.

    Code runs on its own minor version and later ones of the same major version, with an "a" on its own device alone.
    What an "f" allows beside it, a family's own instructions, all later minor versions have, too.
    """
    found = []
    for name in architectures:
        number = name.removesuffix("+PTX")
        version = divmod(int(number.rstrip("af")), 10)
        alone = number.endswith("a") or version in ON_CHIP or capability in ON_CHIP
        if version == capability or (version[0] == capability[0] and version < capability and not alone):
            found.append((version, f"sm_{number}"))
    return max(found)[1] if found else None


def ptx_for(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """The newest PTX among these ("120+PTX") that can be compiled for a device, as "sm_120"; None if none.

    Any device that is not older can have it, those on a chip with the CPU too, but for PTX with a letter.
    """
    numbers = [name.removesuffix("+PTX") for name in architectures if name.endswith("+PTX")]
    versions = [divmod(int(number), 10) for number in numbers if number.isdigit()]
    fitting = [version for version in versions if version <= capability]
    return "sm_{}{}".format(*max(fitting)) if fitting else None


def cuda_is_wanted() -> bool:
    """Raises ValueError where NF4KERNELS_CUDA is neither unset nor 0."""
    wish = os.environ.get(CUDA_VARIABLE)
    if wish not in (None, "0"):
        raise ValueError(f"nf4kernels: {CUDA_VARIABLE} must be 0 (no CUDA kernels) or unset, got {wish}")
    return wish is None


def load_cuda() -> tuple[CudaLibrary | None, str]:
    """The CUDA library where torch has CUDA, else None; and why it was not loaded.

    Raises:
        ValueError: as `cuda_is_wanted`. OSError: the library does not load.
    """
    if not cuda_is_wanted():
        return None, f"{CUDA_VARIABLE}=0"
    if not CUDA_LIBRARY.exists():
        return None, f"{CUDA_LIBRARY.name} was not built (no nvcc at install time?)"
    if torch.version.cuda is None:
        return None, "this torch has no CUDA"
    return CudaLibrary(CUDA_LIBRARY), ""
