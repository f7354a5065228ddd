"""Builds nf4kernels/_cpu.abi3.so and, where nvcc is found, nf4kernels/_cuda.abi3.so, both on torch's stable ABI.

    pip install --no-build-isolation .          # torch must be installed already: its headers are used
    python setup.py build_ext --inplace         # the libraries alone, in this tree; compiles only what changed

_cpu is csrc/cpu, each file with the flags of its instruction set, and its binding; _cuda is csrc/cuda and its binding
for the architectures listed below, and needs neither a GPU nor a torch with CUDA. Objects stay under build/, each with
the command that made it and the files it includes. Without a C++ compiler the package is installed without either
library and runs on its PyTorch reference.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CSRC = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file())  # in an sdist for any machine
# -ffp-contract=off: a contracted multiply-add changes the last bit of a decoded weight (docs/design.md, section 7).
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Wshadow"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12's own AVX-512 headers trip -Wuninitialized (GCC bug 105593).
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
X86_ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
X86_ISAS["amx_bf16"] = [*X86_ISAS["avx512_bf16"], "-mavx512vnni", "-mamx-tile", "-mamx-bf16"]
ARM_ISAS = {"neon": [], "neon_bf16": ["-march=armv8.2-a+bf16+fp16fml"]}
ISAS_OF = {"x86_64": X86_ISAS, "AMD64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}
ISA_FLAGS = {"scalar": [], **ISAS_OF.get(platform.machine(), {})}
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
BUILD = ROOT / "build"  # not setuptools' build_temp, a new folder for every editable install

# What Python runs at its start, once it is in the folder of installed packages.
STARTUP = "nf4kernels/integrations/bitsandbytes/nf4kernels_patch_bitsandbytes.pth"

ROUNDED_CODE = "csrc/rounded_code.cpp"  # of both libraries
CPU_BINDINGS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/bindings/cpu*.cpp"))
OF_EVERY_ISA = ("dispatch", "grouped_lora", "lora_term", "product", "quantize_absmax", "sort_by_expert", "torch_gemm")
CPU_SOURCES = [f"csrc/cpu/{stem}.cpp" for stem in OF_EVERY_ISA]
CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
CUDA_BINDINGS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/bindings/cuda*.cpp"))
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
if platform.machine() == "aarch64":  # Orin and Thor, whose GPUs are on a chip with such a CPU and run no other's code
    CUDA_ARCHITECTURES = tuple(sorted((*CUDA_ARCHITECTURES, "87", "110"), key=lambda name: int(name.rstrip("a"))))
CUDA_VARIABLE, ARCHITECTURES_VARIABLE = "NF4KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"
# -fmad=false: as -ffp-contract=off.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]


def sources_of(isa: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"csrc/cpu/*_{isa}.cpp"))


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
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], check=True, capture_output=True, encoding="utf-8"
        ).stdout.split()
        known = known_architectures([name.removeprefix("compute_") for name in listed])
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


def known_architectures(numbers: Iterable[str]) -> list[str]:
    """Those of CUDA_ARCHITECTURES that a compiler of these numbers ("80", "90") compiles for."""
    return [name for name in CUDA_ARCHITECTURES if name.rstrip("a") in numbers]


def gencode(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * name.endswith("+PTX")
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def compile_changed(commands: dict[str, list[str]], folder: Path) -> list[str]:
    """Compile into `folder`, on all cores, each source whose command or included files changed; all the objects."""
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> str:
        stem = folder / Path(source).name
        output, includes = Path(f"{stem}.o"), Path(f"{stem}.d")
        command = [*commands[source], "-MD", "-MF", str(includes), "-c", source, "-o", str(output)]
        run_if_changed(command, output, lambda: included_files(includes))
        return str(output)

    longest_first = sorted(commands, key=lambda s: (not s.endswith(".cu"), -(ROOT / s).stat().st_size))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, longest_first))


def included_files(makefile: Path) -> list[str]:
    """What the object depends on by the rule that the compiler wrote: the source and every header, the system's too."""
    _, _, files = makefile.read_text(encoding="utf-8").partition(": ")
    return shlex.split(files.replace("\\\n", " "))


def run_if_changed(command: list[str], output: Path, inputs: Callable[[], list[str]]) -> None:
    """Run `command` unless it made `output` after all of its `inputs` last changed."""
    record = output.with_name(f"{output.name}.command")
    try:
        newest = max((ROOT / path).stat().st_mtime for path in inputs())
        if record.read_text() == shlex.join(command) and output.stat().st_mtime >= newest:
            return
    except FileNotFoundError:
        pass
    record.unlink(missing_ok=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        advice = f". To do without the CUDA library, set {CUDA_VARIABLE}=0" if Path(command[0]).name == "nvcc" else ""
        raise CompileError(f"{shlex.join(command)} failed{advice}")
    record.write_text(shlex.join(command))


def link_flags(extension: Extension) -> list[str]:
    return [f"-L{path}" for path in extension.library_dirs] + [f"-l{name}" for name in extension.libraries]


def build_cpu(compiler: list[str], linker: list[str], extension: Extension) -> Path:
    """Compile what changed, and link the library."""
    include = [flag for path in extension.include_dirs for flag in ("-isystem", path)]
    commands = {source: [*compiler, *FLAGS] for source in CPU_SOURCES}
    commands |= {source: [*compiler, *FLAGS, *STABLE_ABI, *include] for source in (*CPU_BINDINGS, ROUNDED_CODE)}
    for isa, flags in ISA_FLAGS.items():
        commands |= {source: [*compiler, *FLAGS, *flags] for source in sources_of(isa)}
    objects = compile_changed(commands, BUILD / "cpu")
    target = BUILD / "cpu" / "_cpu.so"
    run_if_changed([*linker, *objects, *link_flags(extension), "-o", str(target)], target, lambda: objects)
    return target


def build_cuda(nvcc: str, extension: Extension) -> Path:
    """The same with nvcc."""
    architectures = cuda_architectures(nvcc)
    include = [flag for path in extension.include_dirs for flag in ("-isystem", path)]
    binding = [nvcc, *NVCC_FLAGS, "-Xcompiler", "-Wall,-Wextra,-Wshadow", *STABLE_ABI, *include]
    binding.append(f'-DNF4_CUDA_ARCHITECTURES="{" ".join(architectures)}"')
    commands = {source: [nvcc, *NVCC_FLAGS, *gencode(architectures)] for source in CUDA_SOURCES}
    commands |= dict.fromkeys((*CUDA_BINDINGS, ROUNDED_CODE), binding)  # no .cu: nvcc hands them to the host compiler
    objects = compile_changed(commands, BUILD / "cuda")
    target = BUILD / "cuda" / "_cuda.so"
    # No CUDA library is needed to load the result: the runtime is inside, unseen by others, and it looks for a driver
    # when it is first called.
    link = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
    run_if_changed([*link, *objects, *link_flags(extension), "-o", str(target)], target, lambda: objects)
    return target


class BuildLibraries(build_ext):
    def build_extension(self, extension: Extension) -> None:
        if extension.name == "nf4kernels._cuda":
            built = build_cuda(find_nvcc(), extension)
        else:
            built = build_cpu(self.compiler.compiler_so_cxx, self.compiler.linker_so_cxx, extension)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, target)


class BuildPython(build_py):
    """With STARTUP beside the package, where no option of setuptools puts a file.

    An editable install takes nothing of build_lib: its wheel is made of what stands in install_lib.
    """

    def run(self) -> None:
        super().run()
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(folder)
        self.copy_file(str(ROOT / STARTUP), str(Path(folder) / Path(STARTUP).name))


def find_compiler() -> str | None:
    """The command that CXX names, else the first that is there; None for none, and an error where CXX's is not."""
    named = os.environ.get("CXX")
    usual = (sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++")
    found = next((command for command in ([named] if named else usual) if shutil.which(shlex.split(command)[0])), None)
    if named and found is None:
        sys.exit(f"nf4kernels: CXX must be a C++ compiler that is there, got {named}")
    return found


def build_options() -> dict:
    try:
        from torch.utils.cpp_extension import CppExtension
    except ModuleNotFoundError:
        sys.exit(
            "nf4kernels: building needs torch, whose headers it compiles against. Install torch first, then run\n"
            "    pip install --no-build-isolation ."
        )

    cpu = CppExtension(
        "nf4kernels._cpu",
        [*CPU_BINDINGS, ROUNDED_CODE, *CPU_SOURCES, *(source for isa in ISA_FLAGS for source in sources_of(isa))],
        depends=CSRC,
        py_limited_api=True,
    )
    cuda = CppExtension("nf4kernels._cuda", CUDA_BINDINGS, depends=CSRC, py_limited_api=True)
    return {
        "ext_modules": [cpu, cuda] if find_nvcc() else [cpu],
        "cmdclass": {"build_ext": BuildLibraries, "build_py": BuildPython},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    compiler = find_compiler()
    if compiler is None:
        print("nf4kernels: no C++ compiler found, installing without compiled kernels", file=sys.stderr)
    else:
        os.environ["CXX"] = compiler  # setuptools would take the one that Python was built with
    setup(**({"cmdclass": {"build_py": BuildPython}} if compiler is None else build_options()))
