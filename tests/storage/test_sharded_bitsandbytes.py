"""Kept right: a directory of several shards in bitsandbytes' format, written by transformers or by us, loads."""

import pytest
import torch
from support import tiny

import nf4kernels as nf4
from nf4kernels.cli import main


def test_our_shards_load(tmp_path):
    """Report's kind: an index whose shards are loaded one by one, a weight's parts in two of them."""
    model = tiny.llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "in", max_shard_size="60KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    loaded = tiny.llama(torch.bfloat16, vocab_size=96)
    nf4.load_checkpoint(loaded, tmp_path / "out")
    nf4.quantize_model(model, progress=False)
    with torch.no_grad():
        assert torch.equal(loaded(tiny.IDS).logits, model(tiny.IDS).logits)


def test_bitsandbytes_shards_load(tmp_path):
    """A model that transformers quantized by bitsandbytes and saved in shards."""
    pytest.importorskip("bitsandbytes")
    transformers = tiny.transformers()
    tiny.llama(torch.bfloat16).save_pretrained(tmp_path / "in")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "in", quantization_config=options, device_map="cpu", dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = tiny.llama(torch.bfloat16)
    nf4.load_checkpoint(loaded, tmp_path / "out")
    assert len(tiny.layers(loaded)) == 14
    with torch.no_grad():
        got, expected = loaded(tiny.IDS).logits.float(), theirs(tiny.IDS).logits.float()
    assert (got - expected).norm() < 0.05 * expected.norm()
