"""Layers in 8 bits beside those in 4: under a rounding of 4-bit codes, and in a plan that holds both."""

import pytest
import torch
from support.byte_lm import ByteLM

import nf4kernels as nf4
from nf4kernels.recover import Candidate, Gptq, LqLora, agreement, apply_plan, make_plan, sensitivity

TEXT = [torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(("rounding", "lora"), [(Gptq, None), (LqLora, nf4.LoraConfig(r=4))])
def test_a_rounding_leaves_layers_in_8_bits_at_their_nearest_level(rounding, lora):
    model, plain = ByteLM(), ByteLM()
    plan = {"layers.0.down_proj": {"codebook": "int8"}}
    nf4.quantize_model(model, progress=False, plan=plan, rounding=rounding(TEXT), lora=lora)
    nf4.quantize_model(plain, progress=False, plan=plan)
    ours, theirs = (each.layers[0].down_proj.qweight for each in (model, plain))
    assert ours.bits == 8
    assert torch.equal(ours.packed, theirs.packed)
    assert not torch.equal(model.layers[0].up_proj.weight, plain.layers[0].up_proj.weight)


def test_a_plan_of_4_and_8_bits_through_a_file(tmp_path):
    dense, model = ByteLM(), ByteLM()
    candidates = [Candidate({"codebook": name}) for name in ("nf4", "int8")]
    found = sensitivity(dense, TEXT, candidates, progress=False)
    plan = make_plan(found, bits=6.2)
    apply_plan(model, plan, progress=False)
    kinds = {module.codebook for module in model.modules() if isinstance(module, nf4.QuantLinear)}
    assert kinds == {"nf4", "int8"}
    all_nf4 = ByteLM()
    nf4.quantize_model(all_nf4, progress=False)
    assert agreement(model, dense, TEXT).kl < agreement(all_nf4, dense, TEXT).kl
    nf4.save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = ByteLM(seed=1)
    apply_plan(loaded, plan, progress=False)
    nf4.load_checkpoint(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded(TEXT[0])["logits"], model(TEXT[0])["logits"])
