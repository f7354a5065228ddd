"""merge_model's default dtype is what each layer was."""

import pickle

import pytest
import torch
from support import tiny
from torch import nn

import nf4kernels as nf4

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_model_runs_as_it_did(dtype):
    """Report's kind: "expected m1 and m2 to have the same dtype" right after merging an fp16 or fp32 model."""
    model = tiny.fill_adapters(tiny.quantized_llama(dtype, lora=nf4.LoraConfig(r=4)))
    before = model(tiny.IDS).logits
    nf4.merge_model(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    after = model(tiny.IDS).logits
    assert after.dtype == before.dtype
    assert (after - before).float().norm() < 0.1 * before.float().norm()


def test_each_layer_keeps_its_own():
    """Report's kind: parts kept in fp32 (T5's wo, a router) become bf16 in a merge."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).bfloat16())
    nf4.quantize_model(model, progress=False)
    nf4.merge_model(model)
    assert [layer.weight.dtype for layer in model] == [torch.float32, torch.bfloat16]
    assert [layer.bias.dtype for layer in model] == [torch.float32, torch.bfloat16]


def test_a_layer_that_was_cast_merges_into_what_it_computes_in():
    """model.to(bf16) after quantizing moves bias and adapter; the merged weight must fit them."""
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    nf4.quantize_model(model, progress=False)
    model.bfloat16()
    nf4.merge_model(model)
    model(torch.randn(2, 64).bfloat16())


def test_a_layer_merges_alone_as_in_a_model():
    """to_linear has the same default."""
    layer = nf4.QuantLinear(64, 64, dtype=torch.float32)
    assert layer.to_linear().weight.dtype == torch.float32


def test_experts_keep_their_dtype():
    """The same of experts."""
    model = tiny.make("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=1)
    nf4.quantize_model(model, progress=False)
    nf4.merge_model(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model(tiny.IDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_that_is_given_wins(dtype):
    """Kept right."""
    model = nn.Sequential(nn.Linear(64, 64))
    nf4.quantize_model(model, progress=False)
    nf4.merge_model(model, dtype=dtype)
    assert model[0].weight.dtype == dtype


CASTS = {
    "to": lambda model, dtype: model.to(dtype),
    "half or float": lambda model, dtype: model.half() if dtype == torch.float16 else model.float(),
    "a tensor": lambda model, dtype: model.to(torch.empty(0, dtype=dtype)),
    "type": lambda model, dtype: model.type(dtype),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_layer_without_a_bias_follows_the_last_cast(cast, dtype):
    """Nothing of such a layer changes with the cast, yet the dense layer would have: prepare_for_training may cast."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64)).bfloat16()
    nf4.quantize_model(model, progress=False)
    cast(model, dtype)
    model = pickle.loads(pickle.dumps(model))
    nf4.merge_model(model)
    assert model[0].weight.dtype == dtype
    model(torch.randn(2, 64, dtype=dtype))


def test_what_is_no_cast_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).half()
    nf4.quantize_model(model, progress=False)
    model.to("cpu").share_memory().to(torch.empty(0, dtype=torch.float16).device)
    assert model[0].dense_dtype == torch.float16
    model.bfloat16()
    assert model[0].dense_dtype == torch.bfloat16
    model[0].set_qweight(nf4.quantize(torch.randn(64, 64)))
    assert model[0].dense_dtype == torch.float32


def test_a_loaded_layer_is_what_it_takes_the_place_of(tmp_path):
    """A bf16 file loaded into an fp32 model: the layers merge into fp32, as the model around them is."""
    stored = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    nf4.quantize_model(stored, progress=False)
    nf4.save_checkpoint(stored, tmp_path / "a")
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    for again in range(2):
        nf4.load_checkpoint(model, tmp_path / "a")
        assert model[0].dense_dtype == torch.float32, f"loaded {again + 1} times"
    nf4.merge_model(model)
    model(torch.randn(2, 64))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
    nf4.load_checkpoint(model, tmp_path / "a")
    nf4.merge_model(model)
    assert model[0].weight.dtype == torch.bfloat16
