"""A script of cases that torchrun runs on some ranks, which prints "same: case" for each that holds."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from support.paths import python_path


def same_cases(script: str, cases: Sequence[str], ranks: int, directory: Path) -> list[str]:
    """The cases that held; raises with the ranks' own words where the script failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, script, *cases], cwd=directory, env=environment, capture_output=True, encoding="utf-8", timeout=240
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    return [line.removeprefix("same: ") for line in ran.stdout.splitlines() if line.startswith("same: ")]
