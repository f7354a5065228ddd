"""Two tensors that the model ties and the file holds apart: a head that was trained away from the embedding."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from torch import nn

import nf4kernels as nf4

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stored(model, path, **changes):
    """The model's checkpoint with both names of its tied tensor, and `changes`."""
    nf4.save_checkpoint(model, path)
    tensors = load_file(path)
    weight = model.model.embed_tokens.weight.detach()
    save_file(tensors | {EMBEDDING: weight.clone(), HEAD: weight.clone()} | changes, path, {"format": "pt"})
    return load_file(path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_trained_head_is_untied(tmp_path, device):
    tied = tiny.quantized_llama(tie_word_embeddings=True)
    tensors = stored(tied, tmp_path / "a.safetensors", **{HEAD: torch.randn(96, 64)})
    with torch.device(device):
        model = tiny.llama(tie_word_embeddings=True)
    model.tie_weights()
    trainable = model.lm_head.weight.requires_grad
    with pytest.warns(UserWarning, match=rf"{HEAD} is no longer tied to {EMBEDDING}"):
        nf4.load_checkpoint(model, tmp_path / "a.safetensors")
    assert torch.equal(model.lm_head.weight, tensors[HEAD])
    assert torch.equal(model.model.embed_tokens.weight, tensors[EMBEDDING])
    assert model.lm_head.weight.requires_grad == trainable
    if device == "cpu":
        with torch.no_grad():
            hidden = tied.model(tiny.IDS).last_hidden_state
            assert torch.equal(model(tiny.IDS).logits, nn.functional.linear(hidden, tensors[HEAD]))


def test_equal_copies_of_a_tied_weight_stay_tied(tmp_path):
    model = tiny.quantized_llama(tie_word_embeddings=True)
    stored(model, tmp_path / "a.safetensors")
    fresh = tiny.llama(tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nf4.load_checkpoint(fresh, tmp_path / "a.safetensors")
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(fresh(tiny.IDS).logits, model(tiny.IDS).logits)


def test_one_module_under_two_names_cannot_be_untied(tmp_path):
    model = nn.ModuleDict({"a": nn.LayerNorm(4)})
    model["b"] = model["a"]
    tensors = {f"{name}.{leaf}": torch.rand(4) for name in "ab" for leaf in ("weight", "bias")}
    save_file(tensors, tmp_path / "a.safetensors")
    before = model["a"].weight.detach().clone()
    with pytest.raises(ValueError, match=r"a\.weight and b\.weight are tied in the model and cannot be untied"):
        nf4.load_checkpoint(model, tmp_path / "a.safetensors")
    assert torch.equal(model["a"].weight, before)
