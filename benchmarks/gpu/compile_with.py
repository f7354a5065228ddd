"""Whether the CUDA library's sources compile with CUDA versions that are not on this machine; no GPU is needed.

    python -m benchmarks.gpu.compile_with                           all of VERSIONS, for every architecture of setup.py
    python -m benchmarks.gpu.compile_with 12.4 --arch 80 90a        one version, for two architectures
    python -m benchmarks.gpu.compile_with 12.8 --kernels dequantize quantize

NVRTC and the headers of a version come from PyPI, into build/cuda-<version>. NVRTC is nvcc's front end, optimizer and
assembler in one library, for the device's side of a .cu file. The host's side of csrc/bindings is parsed by the C++
compiler with that version's headers, and every name of the CUDA runtime that csrc uses must be declared in them. What
came out is read as by cuda_report: a spill is a failure, too.
"""

import argparse
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch.utils.cpp_extension import include_paths

from nf4kernels.model.report import table as aligned
from setup import CUDA_BINDINGS, CUDA_SOURCES, FLAGS, STABLE_ABI, known_architectures

from .cuda_report import Kernel, faults, kernels_of

ROOT = Path(__file__).parents[2]
VERSIONS = ("12.4", "12.6", "12.8", "12.9", "13.0", "13.5")
PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime")
CRT = {"12": "nvidia-cuda-nvcc", "13": "nvidia-cuda-crt"}  # which package has the headers that the runtime's include
OPTIONS = ["-std=c++17", "-fmad=false", "-default-device", "--pre-include=host_side.h"]

# NVRTC has no standard library: what our sources use of it. And it compiles no host code: launchers are taken for
# device code that calls these, so that each takes the address of its kernels, which compiles them.
STANDARD_HEADERS = {
    "cassert": "",
    "cstdint": """
        typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
        typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
        typedef unsigned long uint64_t, uintptr_t;""",
    "cstring": "namespace std { using ::memcpy; }",
    "type_traits": """
        namespace std {
        template <class A, class B> constexpr bool is_same_v = false;
        template <class A> constexpr bool is_same_v<A, A> = true;
        template <bool, class A, class B> struct conditional { using type = A; };
        template <class A, class B> struct conditional<false, A, B> { using type = B; };
        template <bool c, class A, class B> using conditional_t = typename conditional<c, A, B>::type;
        template <class T> struct remove_reference { using type = T; };
        template <class T> struct remove_reference<T&> { using type = T; };
        template <class T> using remove_reference_t = typename remove_reference<T>::type;
        }""",
    "host_side.h": """
        #include <cuda_runtime.h>
        extern "C" void __assert_fail(const char*, const char*, unsigned, const char*);
        template <class F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) { return cudaSuccess; }
        template <class... P, class... A>
        cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(P...), A&&...) { return cudaSuccess; }
        inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
        inline cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }""",
}


@dataclass(frozen=True)
class Toolkit:
    """A version of CUDA in a folder of ours."""

    version: str
    folder: Path

    @property
    def includes(self) -> list[Path]:
        return sorted({path.parent for name in ("cuda_runtime.h", "crt") for path in self.folder.rglob(name)})

    @property
    def nvrtc(self) -> Path:
        return next(path for path in self.folder.rglob("libnvrtc.so.*") if "alt" not in path.name)


@dataclass
class Result:
    """What came of a version and an architecture, or of a version's host side."""

    version: str
    what: str  # "sm_80", "bindings"
    files: int
    errors: list[str] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


def toolkit(version: str) -> Toolkit:
    """Downloads what of it is not there."""
    folder = ROOT / "build" / f"cuda-{version}"
    if not (folder / "complete").exists():
        major = version.partition(".")[0]
        names = [f"{name}-cu12" if major == "12" else name for name in (*PACKAGES, CRT[major])]
        wanted = [f"{name}=={version}.*" for name in names]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, "--upgrade", *wanted], check=True)
        (folder / "complete").touch()
    return Toolkit(version, folder)


def _strings(texts: Sequence[str]) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*[text.encode() for text in texts])


class Nvrtc:
    """NVIDIA's run-time compiler, of one version."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _call(self, function: str, *arguments) -> None:
        error = getattr(self._library, function)(*arguments)
        if error:
            raise RuntimeError(f"{function}: {self._library.nvrtcGetErrorString(error).decode()}")

    @property
    def architectures(self) -> list[str]:
        """As numbers, without those that have a letter."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return [str(number) for number in numbers]

    def compile(self, source: Path, options: Sequence[str]) -> bytes:
        """The cubin; RuntimeError with what the compiler says."""
        program = ctypes.c_void_p()
        guarded = [f"#pragma once\n{text}\n" for text in STANDARD_HEADERS.values()]
        headers = len(guarded), _strings(guarded), _strings(list(STANDARD_HEADERS))
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), str(source).encode(), *headers)
        try:
            self._call("nvrtcCompileProgram", program, len(options), _strings(options))
        except RuntimeError as error:
            raise RuntimeError(self._text("nvrtcGetProgramLog", program).decode()) from error
        return self._text("nvrtcGetCUBIN", program)

    def _text(self, function: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(function, program, buffer)
        return buffer.raw


def compile_kernels(kit: Toolkit, arch: str, source: Path, cubin: Path) -> str:
    """Writes the cubin of a .cu file; what the compiler says where it fails, else nothing."""
    options = [*OPTIONS, f"--gpu-architecture=sm_{arch}", *(f"-I{path}" for path in (source.parent, *kit.includes))]
    try:
        cubin.write_bytes(Nvrtc(kit.nvrtc).compile(source, options))
    except RuntimeError as error:
        return f"{source.name} for sm_{arch} with CUDA {kit.version}:\n{error}"
    return ""


def parse_binding(kit: Toolkit, source: str) -> str:
    """What the C++ compiler says of a binding with this version's headers."""
    includes = [f"-isystem{path}" for path in (*kit.includes, *include_paths())]
    flags = [*FLAGS, "-Werror", "-fsyntax-only", *STABLE_ABI, '-DNF4_CUDA_ARCHITECTURES=""']
    command = [os.environ.get("CXX", "c++"), *flags, *includes, source]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8", check=False).stderr


def undeclared(kit: Toolkit) -> list[str]:
    """Names of the CUDA runtime that csrc uses and this version's headers do not have."""
    ours = [*map(Path, CUDA_BINDINGS), *(p.relative_to(ROOT) for p in (ROOT / "csrc/cuda").iterdir())]
    used = {name for path in ours for name in re.findall(r"\bcuda[A-Z]\w+", (ROOT / path).read_text(encoding="utf-8"))}
    headers = [path for include in kit.includes for path in include.glob("*.h")]
    declared = {
        name
        for path in headers
        for name in re.findall(r"\bcuda[A-Z]\w+", path.read_text(errors="ignore", encoding="utf-8"))
    }
    return sorted(used - declared)


def results_of(
    kit: Toolkit, architectures: Sequence[str], sources: Sequence[Path], pool: ProcessPoolExecutor
) -> Iterator[Result]:
    """The host side, then one architecture after the other."""
    errors = list(filter(None, pool.map(partial(parse_binding, kit), CUDA_BINDINGS)))
    errors += [f"{name} is not in the headers of CUDA {kit.version}" for name in undeclared(kit)]
    yield Result(kit.version, "bindings", len(CUDA_BINDINGS), errors)
    for arch in architectures:
        cubins = [kit.folder / f"{source.stem}.sm_{arch}.cubin" for source in sources]
        for cubin in cubins:
            cubin.unlink(missing_ok=True)
        errors = list(filter(None, pool.map(partial(compile_kernels, kit, arch), sources, cubins)))
        kernels = kernels_of(cubin for cubin in cubins if cubin.exists())
        yield Result(kit.version, f"sm_{arch}", len(sources), errors, kernels)


def row(result: Result) -> tuple[str, ...]:
    kernels = result.kernels
    most = str(max(k.registers for k in kernels)) if kernels else ""
    count = str(len(kernels)) if kernels else ""
    spilled = len(faults(kernels))
    said = "FAILS" if result.errors else f"compiles, {spilled} kernels spill" if spilled else "compiles"
    return result.version, result.what, str(result.files), count, most, said


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.compile_with",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("versions", nargs="*", default=VERSIONS, help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--arch", nargs="*", help="default: those of setup.py that the version knows")
    parser.add_argument("--kernels", nargs="*", metavar="STEM", help="of csrc/cuda/*.cu; default: all")
    args = parser.parse_args()
    sources = [ROOT / s for s in CUDA_SOURCES if args.kernels is None or Path(s).stem in args.kernels]
    rows, failed = [("CUDA", "for", "files", "kernels", "registers at most", "")], False
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for version in args.versions:
            kit = toolkit(version)
            known = known_architectures(Nvrtc(kit.nvrtc).architectures)
            for result in results_of(kit, args.arch or known, sources, pool):
                rows.append(row(result))
                said = result.errors + faults(result.kernels)
                failed |= bool(said)
                print(" ".join(rows[-1]), *said, sep="\n", flush=True)
    print("\n" + aligned(rows, left=(0, 1, 5)))
    sys.exit(failed)


if __name__ == "__main__":
    main()
