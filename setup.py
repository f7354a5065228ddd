"""Builds nf4kernels/_cpu.abi3.so: one static library per instruction set, then the binding on torch's stable ABI.

    pip install --no-build-isolation .          # torch must be installed already: its headers are used

Without a C++ compiler the package is installed without the library and runs on its PyTorch reference.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CPU = "csrc/cpu"
HEADERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))
# -ffp-contract=off: a contracted multiply-add changes the last bit of a decoded weight (DESIGN: numerics).
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-ffp-contract=off", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12's own AVX-512 headers trip -Wuninitialized (GCC bug 105593).
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}


def sources_of(isa: str) -> list[str]:
    stems = ("quantize", "dequantize", "linear", "linear_dgrad", "lora_grad")
    return [f"{CPU}/{stem}_{isa}.cpp" for stem in stems if (ROOT / f"{CPU}/{stem}_{isa}.cpp").exists()]


def build_options() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError:
        sys.exit(
            "nf4kernels: building needs torch, whose headers it compiles against. Install torch first, then run\n"
            "    pip install --no-build-isolation ."
        )
    libraries = [
        (f"nf4kernels_{isa}", {"sources": sources_of(isa), "cflags": [*FLAGS, *flags], "obj_deps": {"": HEADERS}})
        for isa, flags in ISA_FLAGS.items()
    ]
    binding = CppExtension(
        "nf4kernels._cpu",
        [
            "csrc/torch_cpu.cpp",
            *(f"{CPU}/{name}.cpp" for name in ("dispatch", "bf16_code", "quantize_absmax", "low_rank")),
        ],
        depends=HEADERS,
        py_limited_api=True,
        define_macros=[("TORCH_STABLE_ONLY", None), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=FLAGS,
    )
    return {
        "libraries": libraries,
        "ext_modules": [binding],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    if not has_compiler:
        print("nf4kernels: no C++ compiler found, installing without compiled kernels", file=sys.stderr)
    setup(**(build_options() if has_compiler else {}))
