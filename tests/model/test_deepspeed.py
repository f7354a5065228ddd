"""DeepSpeed's ZeRO-2 and ZeRO-3 over two processes: everything is bit for bit what one process has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import python_path

pytest.importorskip("deepspeed", reason="deepspeed is not installed: no engine is made")

SCRIPT = Path(__file__).parents[1] / "support" / "deepspeed_steps.py"
BOTH = ("llama", "bf16", "checkpointing", "tied", "experts", "peft", "casts", "resume", "resume with its base")
CASES = [
    *(f"zero2 {case}" for case in BOTH),
    *(f"zero3 {case}" for case in (*BOTH, "odd rows", "offload", "files", "from_pretrained")),
]


@pytest.mark.slow
def test_steps_of_an_engine_are_those_of_the_whole_model(tmp_path):
    """Losses, gradients, trained weights; frozen bytes that are partitioned, gathered and released; checkpoints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(
        [*command, str(SCRIPT), *CASES], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8",
        timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [line for line in ran.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in CASES]
