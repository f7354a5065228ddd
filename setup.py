"""Builds nf4kernels/_cpu.abi3.so and, where nvcc is found, nf4kernels/_cuda.abi3.so, both on torch's stable ABI.

    pip install --no-build-isolation .          # torch must be installed already: its headers are used

_cpu is one static library per instruction set and the binding; _cuda is csrc/cuda and its binding for the architectures
listed below, and needs neither a GPU nor a torch with CUDA. Without a C++ compiler the package is installed without
either and runs on its PyTorch reference.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CPU = "csrc/cpu"
HEADERS = sorted(str(p.relative_to(ROOT)) for suffix in ("h", "cuh") for p in ROOT.glob(f"csrc/**/*.{suffix}"))
# -ffp-contract=off: a contracted multiply-add changes the last bit of a decoded weight (DESIGN: numerics).
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-ffp-contract=off", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12's own AVX-512 headers trip -Wuninitialized (GCC bug 105593).
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
STABLE_ABI = [("TORCH_STABLE_ONLY", None), ("TORCH_TARGET_VERSION", "0x020a000000000000")]

ROUNDED_CODE = "csrc/rounded_code.cpp"  # of both libraries

CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
CUDA_BINDINGS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/bindings/cuda*.cpp"))
CUDA_OBJECTS = ROOT / "build" / "cuda"  # not in setuptools' own folder, which pip makes anew for every build
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
CUDA_VARIABLE, ARCHITECTURES_VARIABLE = "NF4KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"
# -fmad=false: as -ffp-contract=off.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]


def sources_of(isa: str) -> list[str]:
    stems = ("quantize", "dequantize", "linear", "linear_dgrad", "lora_grad")
    return [f"{CPU}/{stem}_{isa}.cpp" for stem in stems if (ROOT / f"{CPU}/{stem}_{isa}.cpp").exists()]


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, of PATH or of /usr/local/cuda; None where there is none or NF4KERNELS_CUDA=0."""
    wish = os.environ.get(CUDA_VARIABLE)
    if wish not in (None, "0"):
        sys.exit(f"nf4kernels: {CUDA_VARIABLE} must be 0 (no CUDA library) or unset, got {wish}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    candidates = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, candidates) if found), None)


def cuda_architectures(nvcc: str) -> list[str]:
    """What to compile for, as "80", "90a", or "120+PTX" for code that newer devices can compile as well.

    TORCH_CUDA_ARCH_LIST says it, else CUDA_ARCHITECTURES as far as this nvcc knows them, with PTX of the newest without
    a letter.
    """
    asked = os.environ.get(ARCHITECTURES_VARIABLE, "").replace(";", " ").split()
    if not asked:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        known = [a for a in CUDA_ARCHITECTURES if f"compute_{a.rstrip('a')}" in listed]
        if "80" not in known:
            sys.exit(f"nf4kernels: the CUDA kernels need an nvcc that knows sm_80; {nvcc} knows {' '.join(listed)}")
        newest = [a for a in known if a.isdigit()][-1]
        return [f"{a}+PTX" if a == newest else a for a in known]
    architectures = []
    for item in asked:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            sys.exit(f'nf4kernels: {ARCHITECTURES_VARIABLE} must be like "8.0;9.0a+PTX", got {item}')
        major, minor, variant, ptx = match.groups(default="")
        if int(major) < 8:
            print(f"nf4kernels: the CUDA kernels need sm_80, leaving out {item}", file=sys.stderr)
        else:
            architectures.append(f"{major}{minor}{variant}{ptx}")
    if not architectures:
        sys.exit(f"nf4kernels: {ARCHITECTURES_VARIABLE} must hold 8.0 or newer, got {' '.join(asked)}")
    return architectures


def gencode(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * name.endswith("+PTX")
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def build_cuda(nvcc: str, target: str, include: list[str], library_dirs: list[str], libraries: list[str]) -> None:
    """Compiles what changed since the last build, as many files at once as there are cores, and links `target`."""
    architectures = cuda_architectures(nvcc)
    kernel_flags = [*NVCC_FLAGS, *gencode(architectures)]
    defines = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in STABLE_ABI]
    binding_flags = [*NVCC_FLAGS, "-Xcompiler", "-Wall,-Wextra", *defines]
    binding_flags += [flag for path in include for flag in ("-isystem", path)]
    binding_flags.append(f'-DNF4_CUDA_ARCHITECTURES="{" ".join(architectures)}"')
    commands = {source: [nvcc, *kernel_flags, "-c", source] for source in CUDA_SOURCES}
    for source in (*CUDA_BINDINGS, ROUNDED_CODE):  # no .cu: nvcc hands them to the host compiler
        commands[source] = [nvcc, *binding_flags, "-c", source]
    CUDA_OBJECTS.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> str:
        stem = CUDA_OBJECTS / Path(source).name
        output, record = Path(f"{stem}.o"), Path(f"{stem}.command")
        command = [*commands[source], "-o", str(output)]
        newest_input = max((ROOT / path).stat().st_mtime for path in (source, *HEADERS))
        same_command = record.exists() and record.read_text() == shlex.join(command)
        if not same_command or not output.exists() or output.stat().st_mtime < newest_input:
            record.unlink(missing_ok=True)
            run_nvcc(command)
            record.write_text(shlex.join(command))
        return str(output)

    longest_first = sorted(commands, key=lambda source: (source not in CUDA_SOURCES, -(ROOT / source).stat().st_size))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, longest_first))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    # No CUDA library is needed to load the result: the runtime is inside, unseen by others, and it looks for a driver
    # when it is first called.
    link = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
    run_nvcc([nvcc, *link, "-o", target, *objects, *(f"-L{p}" for p in library_dirs), *(f"-l{n}" for n in libraries)])


def run_nvcc(command: list[str]) -> None:
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise CompileError(f"{shlex.join(command)} failed. To do without the CUDA library, set {CUDA_VARIABLE}=0")


def build_options(nvcc: str | None) -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError:
        sys.exit(
            "nf4kernels: building needs torch, whose headers it compiles against. Install torch first, then run\n"
            "    pip install --no-build-isolation ."
        )

    class BuildLibraries(BuildExtension):
        def build_extension(self, extension) -> None:
            if extension.name != "nf4kernels._cuda":
                super().build_extension(extension)
                return
            target = self.get_ext_fullpath(extension.name)
            build_cuda(nvcc, target, extension.include_dirs, extension.library_dirs, extension.libraries)

    libraries = [
        (f"nf4kernels_{isa}", {"sources": sources_of(isa), "cflags": [*FLAGS, *flags], "obj_deps": {"": HEADERS}})
        for isa, flags in ISA_FLAGS.items()
    ]
    cpu = CppExtension(
        "nf4kernels._cpu",
        [
            "csrc/bindings/cpu.cpp",
            ROUNDED_CODE,
            *(f"{CPU}/{name}.cpp" for name in ("dispatch", "quantize_absmax", "low_rank")),
        ],
        depends=HEADERS,
        py_limited_api=True,
        define_macros=STABLE_ABI,
        extra_compile_args=FLAGS,
    )
    cuda = CppExtension("nf4kernels._cuda", CUDA_BINDINGS, py_limited_api=True)
    return {
        "libraries": libraries,
        "ext_modules": [cpu, cuda] if nvcc else [cpu],
        "cmdclass": {"build_ext": BuildLibraries.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    if not has_compiler:
        print("nf4kernels: no C++ compiler found, installing without compiled kernels", file=sys.stderr)
    setup(**(build_options(find_nvcc()) if has_compiler else {}))
