"""torch.distributed.checkpoint on models in 4 bits: saved on two ranks, gone on with on one, two and four."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import checkpoint_steps
from support.paths import python_path


@pytest.mark.slow
def test_a_state_saved_on_two_ranks_goes_on_on_any_number(tmp_path):
    """The same losses and packed bytes, optimizer included, into a model of other bytes, which the guard lets pass."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, str(Path(checkpoint_steps.__file__)), str(tmp_path), *checkpoint_steps.CASES], cwd=tmp_path,
        env=environment, capture_output=True, encoding="utf-8", timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = [line for line in ran.stdout.splitlines() if line.startswith("same")]
    assert said == [f"same: {case}" for case in checkpoint_steps.CASES]
