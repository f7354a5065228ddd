"""FSDP2 by hand: packed bytes shard by rows, and everything is bit for bit what one process has."""

import pytest
from support import fsdp_steps
from support.torchrun import same_cases

ON_TWO = (
    "llama", "odd rows", "kept after forward", "mixed precision", "offloaded", "checkpointing", "compile", "tied",
    "experts", "float scales", "mxfp4", "nvfp4", "several adapters", "peft", "accumulation", "clipped", "every byte",
)  # fmt: skip
ON_FOUR = ("odd rows", "hsdp")


@pytest.mark.slow
def test_sharded_steps_are_those_of_the_whole_model(tmp_path):
    """Losses, gradients, three steps and the gathered state.

    Reports' kinds: packed bytes kept as bf16, whose NaNs are rewritten (bitsandbytes 1945); clip_grad_norm_ over mixed
    tensors; a rank with its own rows of a batch.
    """
    same_cases(fsdp_steps, ON_TWO, tmp_path)


@pytest.mark.slow
def test_four_ranks_and_two_replicas_of_two_shards(tmp_path):
    same_cases(fsdp_steps, ON_FOUR, tmp_path, ranks=4)
