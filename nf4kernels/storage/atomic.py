"""Files and directories that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: there two runs at a time are not told apart
    fcntl = None  # type: ignore[assignment]


class TargetError(ValueError):
    """A directory that cannot be written now; the message goes on from the caller's name of it: "must ..., got ..."."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; on success it is flushed to disk and renamed to `path`, else removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = (path if path.exists() else partial).stat().st_mode
        yield partial
        partial.chmod(mode)  # a writer may have made a private file in its place, as safetensors does
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory beside `path`; on success it is flushed to disk and takes path's place, else removed.

    Whether an existing `path` may be replaced is for the caller to know. What a killed run left behind is removed by
    the next one; of two runs at a time the second is refused.

    Raises:
        TargetError: the directory cannot be made, or another run is writing it.
    """
    path = path.resolve() if path.is_symlink() else path
    staging, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise TargetError(f"must be a path that can be made, got {error}") from None
    try:
        _lock(lock, path)
        try:
            _clear(staging)
            if replaced.exists():  # a run was killed between its two renames, or before it had tidied up
                shutil.rmtree(replaced) if path.exists() else replaced.rename(path)
            yield staging
            flush(staging)
            if path.exists():
                path.rename(replaced)
            staging.rename(path)
            flush(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_file(source: Path, path: Path) -> None:
    """The bytes of `source`, not its mode."""
    with replacing(path) as partial:
        shutil.copyfile(source, partial)


def flush(path: Path) -> None:
    """fsync of a file or a directory: what it holds survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """The kernel lets go of the lock when the process ends, however it ends."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TargetError(f"must not be written by another run, got {path} which is") from None


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
