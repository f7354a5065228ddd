"""Compiles CUDA sources for the host executor into a shared library under build/executor, and again only what changed.

Processes take turns by a lock on the library's folder: of several that build the same library, the first compiles and
the others find it done.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXECUTOR = Path(__file__).parent
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
# -ffp-contract=off: as nvcc's -fmad=false. -fno-ipa-icf: merged functions would have one name in the launch log.
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-ipa-icf"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DNF4_EXECUTOR", f"-I{EXECUTOR}"]
ASAN_FLAGS = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer"]
# The compiler calls races.cpp before each load and store of the kernels, and leaves them as the source has them.
RACES_FLAGS = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-fno-tree-sra"]
RACES_FLAGS += ["-fno-tree-vectorize", "-fno-store-merging", "-O1", "-g1"]
COMPILES_AT_ONCE = 2


def build(
    name: str,
    sources: Iterable[Path],
    flags: Iterable[str] = (),
    link: Iterable[str] = (),
    asan: bool = False,
    races: bool = False,
    csrc: Path = CSRC,
) -> Path:
    """The library build/executor/<name>/<name>-<hash>.so of these .cu and .cpp files and the executor.

    asan: with AddressSanitizer. races: with the race detector, for which no other process environment is needed.
    csrc: the folder of which headers are taken.
    """
    folder = ROOT / "build" / "executor" / "-".join([name] + ["asan"] * asan + ["races"] * races)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        return _build(folder, name, sources, [*flags, f"-I{csrc}"], link, asan, races)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file, which ends with the process at the latest."""
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    folder: Path,
    name: str,
    sources: Iterable[Path],
    flags: Iterable[str],
    link: Iterable[str],
    asan: bool,
    races: bool,
) -> Path:
    flags = [*FLAGS, *flags, *(ASAN_FLAGS if asan else []), *(["-DNF4_EXECUTOR_RACES"] if races else [])]
    executor = sorted([*EXECUTOR.glob("*.cpp"), *(EXECUTOR.glob("races/*.cpp") if races else [])])

    def compiled(source: Path) -> Path:
        hooks = RACES_FLAGS if races and source.suffix == ".cu" else []
        command = [CXX, *flags, *hooks, "-x", "c++", "-c", str(source)]
        included = folder / f"{source.name}-{_hash(*command)}.d"
        target = _object(included, source)
        if target is None or not target.exists():
            for old in folder.glob(f"{source.name}-*"):
                old.unlink()
            new = folder / f"{source.name}.o"
            _run(new, [*command, "-MMD", "-MF", str(included)])
            target = _object(included, source)
            new.replace(target)
        return target

    with ThreadPoolExecutor(COMPILES_AT_ONCE) as pool:
        objects = list(pool.map(compiled, [*executor, *sources]))
    library = folder / f"{name}-{_hash(*map(str, objects), *link)}.so"
    if not library.exists():
        sanitizers = ASAN_FLAGS if asan else []
        _run(library, [CXX, "-shared", *sanitizers, *map(str, objects), *link, "-ldl"])
        for old in set(folder.glob("*.so")) - {library}:
            old.unlink(missing_ok=True)
    return library


def asan_environment() -> dict[str, str]:
    """The environment of a python that loads a library built with asan=True: the sanitizer must be loaded first."""
    preload = [
        subprocess.run(
            [CXX, f"-print-file-name={library}"], capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
        for library in ("libasan.so", "libstdc++.so.6")
    ]
    return {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}


def _object(included: Path, source: Path) -> Path | None:
    """The object of the source and of what it includes, as the compiler listed it when it last compiled it."""
    if not included.exists():
        return None
    files = [source, *map(Path, included.read_text(encoding="utf-8").replace("\\\n", " ").split()[1:])]
    if not all(file.exists() for file in files):
        return None
    return included.with_name(
        f"{source.name}-{_hash(included.name, *(file.read_text(encoding='utf-8') for file in files))}.o"
    )


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _run(target: Path, command: list[str]) -> None:
    """Writes target whole or not at all, so that an interrupted build leaves nothing that looks finished."""
    unfinished = target.with_suffix(f".unfinished{target.suffix}")
    result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, encoding="utf-8", check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)
    unfinished.replace(target)
