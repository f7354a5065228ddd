"""A script of tests/support on some ranks of this machine."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from support.paths import python_path


def same_cases(
    script: ModuleType, cases: tuple[str, ...], folder: Path, ranks: int = 2, launcher: tuple[str, ...] = ()
) -> None:
    """Run it with `cases` as its arguments, each of which it must say to be the same, in that order.

    Args:
        launcher: a module and its arguments, in place of torchrun's.
    """
    launcher = launcher or ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    command = [sys.executable, "-m", *launcher]
    ran = subprocess.run(
        [*command, str(Path(script.__file__)), *cases], cwd=folder, capture_output=True, encoding="utf-8",
        env=os.environ | python_path() | {"OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [line for line in ran.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in cases]
