"""DDP by hand: the replicas' steps are bit for bit those of one process with the rows of all."""

import pytest
from support import ddp_steps
from support.torchrun import same_cases

CASES = (
    "llama", "odd rows", "tied", "experts", "checkpointing", "static graph", "unused", "buffers left alone",
    "gradients in place", "no_sync", "compile", "float scales", "mxfp4", "several adapters", "peft", "every byte",
)  # fmt: skip


@pytest.mark.slow
def test_replicas_train_as_one_process_does(tmp_path):
    """From rank 0's values and bytes, with no checksum after the first step, though DDP broadcasts buffers each time.

    Report's kind: packed bytes kept as bf16, whose NaNs are rewritten (bitsandbytes 1945).
    """
    same_cases(ddp_steps, CASES, tmp_path)
