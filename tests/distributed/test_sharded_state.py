"""What is saved, loaded and merged of a model that ranks hold together is what one process would have, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import sharded_state_steps
from support.paths import python_path

ON_TWO = (
    "save: llama", "save: odd rows", "save: tied", "save: experts", "save: kept after forward",
    "quantize: llama", "quantize: odd rows", "quantize: tied", "quantize: experts",
    "adapters: llama", "adapters: experts",
    "merge: llama", "merge: odd rows", "merge: tied", "merge: experts",
    "refused: llama", "refused: experts", "memory: linears",
)  # fmt: skip
ON_FOUR = ("placed: llama", "placed: experts", "pairs: llama")
# Freed memory goes back at once, so that a rank's peak is of what it holds.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cases"), [(2, ON_TWO), (4, ON_FOUR)])
def test_sharded_models_are_saved_loaded_and_merged(tmp_path, ranks, cases):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ran = subprocess.run(
        [*command, str(Path(sharded_state_steps.__file__)), str(tmp_path), *cases], cwd=tmp_path,
        env=os.environ | python_path() | ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=400,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [line for line in ran.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in cases]
