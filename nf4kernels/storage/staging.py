"""An output directory that appears whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cli.errors import CommandError
from .atomic import flush


@contextmanager
def staged_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `target`, renamed to it at the end, removed after an error.

    What a killed run left behind is removed by the next one; of two runs at a time the second is refused.

    Raises:
        CommandError: target exists (with `overwrite`: and is not a model directory), or cannot be made.
    """
    _check_target(target, overwrite)
    staging, replaced = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.replaced")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise CommandError(f"OUT_DIR must be a path that can be made, got {error}") from None
    try:
        _lock(lock, target)
        try:
            _clear(staging)
            if replaced.exists():  # a run was killed between its two renames, or before it had tidied up
                shutil.rmtree(replaced) if target.exists() else replaced.rename(target)
            yield staging
            flush(staging)
            if target.exists():
                target.rename(replaced)
            staging.rename(target)
            flush(target.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise CommandError(f"OUT_DIR must not exist (or say --overwrite), got {target}")
    weights = any(target.glob("*.safetensors")) if target.is_dir() else False
    if not weights or not (target / "config.json").is_file():
        raise CommandError(f"OUT_DIR must be a model directory to be overwritten, got {target} without model files")


def _lock(descriptor: int, target: Path) -> None:
    """The kernel lets go of the lock when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CommandError(f"OUT_DIR must not be written by another run, got {target} which is") from None


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
