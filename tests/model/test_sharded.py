"""FSDP2 over two processes: packed bytes shard by rows, and everything is bit for bit what one process has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import sharded_steps
from support.paths import python_path

CASES = ("llama", "odd rows", "kept after forward", "mixed precision", "checkpointing", "tied", "experts")


@pytest.mark.slow
def test_sharded_steps_are_those_of_the_whole_model(tmp_path):
    """Losses, gradients and the gathered state. Report's kind: packed bytes kept as bf16, whose NaNs are rewritten."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, str(Path(sharded_steps.__file__)), *CASES], cwd=tmp_path, env=environment, capture_output=True,
        encoding="utf-8", timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [line for line in ran.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in CASES]
