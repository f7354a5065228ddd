"""Compiles the kernels on AMX tiles against emulated.h, into a program for CPUs without AMX: build/tiles/ops."""

from pathlib import Path

from executor.build import locked

from setup import BUILD, CPU_SOURCES, FLAGS, ISA_FLAGS, ROUNDED_CODE, compile_changed, run_if_changed, sources_of

FOLDER, LIBRARY = BUILD / "tiles", BUILD / "cpu"
DETECTION = "csrc/cpu/torch_gemm.cpp"
ON_TILES = sources_of("amx_bf16")
OTHERS = [s for s in (*CPU_SOURCES, ROUNDED_CODE, *(s for isa in ISA_FLAGS for s in sources_of(isa)))
          if s not in (*ON_TILES, DETECTION)]  # fmt: skip


def missing() -> str:
    """Why it cannot be built here; empty where it can."""
    if "amx_bf16" not in ISA_FLAGS:
        return "AMX is of x86-64"
    return "" if all(object_of(source).exists() for source in OTHERS) else "needs the objects of `make build`"


def object_of(source: str) -> Path:
    return LIBRARY / f"{Path(source).name}.o"


def build() -> Path:
    """The program: all that has no tiles in it is what the library was linked of."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with locked(FOLDER / "lock"):
        flags = [flag for flag in ISA_FLAGS["amx_bf16"] if not flag.startswith("-mamx")]
        emulated = ["c++", *FLAGS, *flags, "-include", "tests/tiles/emulated.h"]
        commands = dict.fromkeys(ON_TILES, emulated)
        commands[DETECTION] = ["c++", *FLAGS, "-Ddetect_amx=detect_real_amx"]
        commands |= {f"tests/{path}": ["c++", *FLAGS, "-Icsrc"] for path in ("tiles/detect.cpp", "arm/ops.cpp")}
        objects = [*compile_changed(commands, FOLDER), *(str(object_of(source)) for source in OTHERS)]
        program = FOLDER / "ops"
        run_if_changed(["c++", *objects, "-o", str(program)], program, lambda: objects)
    return program
