"""A cast that would make a finite value infinite is an error that names the tensor, wherever the package casts."""

import pytest
import torch
from torch import nn

import nf4kernels as nf4
from nf4kernels.nn.casts import cast, check_cast

LARGE = 1e5  # fp16 ends at 65504


def test_cast():
    for value, dtype in ((65504.0, torch.float16), (1e38, torch.bfloat16), (torch.inf, torch.float16), (LARGE, None)):
        tensor = torch.tensor([[1.0, value]])
        out = cast(tensor, dtype or torch.float32, "x")
        assert out.dtype == (dtype or torch.float32)
        assert torch.equal(out, tensor.to(out.dtype))
    for value, dtype in ((-LARGE, torch.float16), (65520.0, torch.float16), (3.4e38, torch.bfloat16)):
        tensor = torch.tensor([[1.0, torch.inf], [torch.nan, value]])
        for function in (cast, check_cast):
            with pytest.raises(ValueError, match=r"x must fit b?float16 \(up to .*\), got .* at \[1, 1\]"):
                function(tensor, dtype, "x")
    for kept in (torch.empty(0), torch.empty(2, device="meta"), torch.tensor([70_000])):
        assert cast(kept, torch.float16, "x").dtype == torch.float16


@pytest.fixture
def layer():
    layer = nf4.QuantLinear(64, 32, dtype=torch.float32)
    return nf4.QuantLinear.from_quantized(nf4.quantize(layer.dequantize(torch.float32) * 1e6), layer.bias)


def test_merging_refuses(layer):
    layer.to_linear(torch.bfloat16)
    with pytest.raises(ValueError, match=r"QuantLinear\.to_linear: weight must fit float16"):
        layer.to_linear(torch.float16)
    with pytest.raises(ValueError, match=r"merge_model: layer 0 failed, .* weight must fit float16"):
        nf4.merge_model(nn.Sequential(layer), dtype=torch.float16)
    small = nf4.QuantLinear(64, 32, dtype=torch.float32)
    with torch.no_grad():
        small.bias[3] = LARGE
    with pytest.raises(ValueError, match=r"QuantLinear.to_linear: bias must fit float16 .* got 100000 at \[3\]"):
        small.to_linear(torch.float16)


def test_merging_into_a_base_refuses():
    model, base = nn.Sequential(nn.Linear(64, 32)), nn.Sequential(nn.Linear(64, 32))
    nf4.quantize_model(model, progress=False)
    with torch.no_grad():
        base[0].weight[2, 5] = LARGE
    with pytest.raises(ValueError, match=r"weight must fit float16 .* at \[2, 5\]"):
        nf4.merge_model(model, base, torch.float16)


def test_loading_refuses_and_changes_nothing(tmp_path):
    source, target = (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)) for _ in range(2))
    nf4.quantize_model(source, progress=False)
    with torch.no_grad():
        source[0].weight[7] = LARGE
    nf4.save_checkpoint(source, tmp_path / "a")
    target.half()
    with pytest.raises(ValueError, match=r"load_checkpoint: 0.weight must fit float16 .* got 100000 at \[7\]"):
        nf4.load_checkpoint(target, tmp_path / "a")
    assert type(target[1]) is nn.Linear
    assert torch.equal(target[0].weight, torch.ones(64, dtype=torch.float16))


def test_loading_adapters_refuses(tmp_path):
    source, target = (nn.Sequential(nn.Linear(64, 32)) for _ in range(2))
    nf4.quantize_model(source, lora=nf4.LoraConfig(r=2), progress=False)
    with torch.no_grad():
        source[0].lora_B.weight[1, 1] = -LARGE
    nf4.save_adapters(source, tmp_path)
    nf4.quantize_model(target.half(), lora=nf4.LoraConfig(r=2), progress=False)
    before = target[0].lora_A.weight.clone()
    with pytest.raises(ValueError, match=r"the adapter of 0 must fit float16 .* got -100000 at \[1, 1\]"):
        nf4.load_adapters(target, tmp_path)
    assert torch.equal(target[0].lora_A.weight, before)


def test_experts_refuse():
    from support.fused_experts import fused

    module = fused()
    with torch.no_grad():
        module.down_proj[1, 2, 3] = LARGE
    experts = nf4.QuantExperts.from_experts(module)
    experts.to_experts(torch.bfloat16)
    with pytest.raises(ValueError, match=r"QuantExperts\.to_experts: down_proj must fit float16"):
        experts.to_experts(torch.float16)
    with pytest.raises(ValueError, match=r"down_proj must fit float16 .* at \[1, 2, 3\]"):
        experts.to_experts(torch.float16, [module.gate_up_proj, module.down_proj])
