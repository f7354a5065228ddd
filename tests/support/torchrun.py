"""A script of tests/support on some ranks of this machine: how it is run, and what it does there."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
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
    assert ran.returncode == 0, ran.stderr[-6000:]
    assert [line for line in ran.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in cases]


def check_on_ranks(check: Callable[[str], None]) -> None:
    """In the script: `check` of each case that it was given, which it then says to be the same."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in sys.argv[1:]:
        check(case)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"same: {case}", flush=True)
    dist.destroy_process_group()
