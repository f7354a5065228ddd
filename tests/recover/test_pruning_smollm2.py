"""Pruning of SmolLM2-135M: what the scores are worth there, and what is cut."""

import copy

import pytest
import torch
from support import smollm2

import nf4kernels as nf4
from nf4kernels.demo.data import HELD_OUT, definitions
from nf4kernels.recover import agreement, find_structure, prune_model, prune_structure, share_of_zeros

transformers = pytest.importorskip("transformers", reason="transformers is not installed: no model is loaded")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded():
    """(the model, 512 tokens of definitions for scores, 512 held-out ones)."""
    directory = smollm2.directory()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    model.config.use_cache = False
    rows = definitions()
    texts = ("\n".join(row["prompt"] + row["completion"] for row in part) for part in (rows[:100], rows[-HELD_OUT:]))
    ids = [torch.tensor(tokenizer(text)["input_ids"][:512]).reshape(8, 64) for text in texts]
    return model, *([{"input_ids": each}] for each in ids)


def test_wanda_loses_less_than_half_of_what_magnitude_loses_and_4_bits_keep_its_zeros(loaded):
    model, scored, held_out = loaded
    divergences = {}
    for method in ("wanda", "magnitude"):
        pruned = copy.deepcopy(model)
        masks = prune_model(pruned, 0.5, method=method, batches=scored, progress=False)
        divergences[method] = agreement(pruned, model, held_out).kl
        if method == "wanda":
            nf4.quantize_model(pruned, progress=False)
            assert share_of_zeros(pruned, masks) >= 0.5 - 1e-4
    assert divergences["wanda"] < divergences["magnitude"] / 2


def test_a_quarter_of_the_channels_is_gone_and_no_block_straddles_rows(loaded):
    model, scored, held_out = loaded
    cut = copy.deepcopy(model)
    structure = find_structure(cut, 9, 3)
    prune_structure(cut, structure, "channels", 0.25, "wanda", scored, progress=False)
    assert cut.model.layers[7].mlp.down_proj.weight.shape == (576, 1152)
    gone = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in cut.parameters())
    assert gone == 30 * 3 * 576 * 384 * 2
    assert agreement(cut, model, held_out).kl < 2
    nf4.quantize_model(cut, progress=False)
    down = cut.model.layers[7].mlp.down_proj
    assert down.absmax.shape == (576, 1152 // 64), "blocks go along rows"
