"""The held-out losses around a merge, by the script that prints them for SmolLM2, on a model trained right here."""

import pytest
import torch
from support import tiny
from support.peft_layers import peft

from benchmarks.model import merge_table
from benchmarks.model.answers import train
from nf4kernels.stages.text_loss import Batch

LENGTH, WORDS = 24, 93


def batches(step, count, seed):
    """Sequences of two tokens and their rule, which the model is to find: the next is the sum, `step` added."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, WORDS, (16, LENGTH + 1), generator=generator)
        for column in range(2, LENGTH + 1):
            ids[:, column] = (ids[:, column - 1] + step) % WORDS
        ids += 3
        made.append(Batch(ids, torch.ones_like(ids), torch.ones(16, LENGTH, dtype=torch.bool)))
    return made


def test_the_merges_in_order():
    pytest.importorskip("transformers")
    assert peft
    base = tiny.llama()
    train(base, batches(1, 80, 0), 3e-3, "base")
    losses = merge_table.merge_losses(base, batches(2, 30, 1), batches(2, 4, 2), rank=4, learning_rate=1e-2)
    tuned = losses["NF4 + LoRA"]
    assert tuned < min(losses["NF4"], losses["16-bit base"]) - 1
    assert abs(losses["merged into Ŵ"] - tuned) < 1e-3
    assert losses["merged into the base"] < losses["16-bit base"] - 1
    assert losses["merged back into 4 bits"] > losses["merged into Ŵ"]
