"""What is made inside torch.inference_mode() trains afterwards."""

import pytest
import torch
from torch import nn

import nf4kernels as nf4

CONFIG = nf4.LoraConfig(r=4)
X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


def trained(model, x=X):
    model(x).square().mean().backward()
    return [p.grad for n, p in model.named_parameters() if "lora_" in n]


def test_a_model_quantized_in_inference_mode_trains():
    """ "Inference tensors cannot be saved for backward", after a script that loads under it."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.inference_mode():
        nf4.quantize_model(model, lora=CONFIG, progress=False)
    assert all(g is not None for g in trained(model))


def test_adapters_added_in_inference_mode_train():
    """The same of add_lora alone."""
    layer = nf4.QuantLinear(64, 64, dtype=torch.float32)
    with torch.inference_mode():
        layer.add_lora(CONFIG)
    assert all(g is not None for g in trained(layer))


def test_a_layer_built_in_inference_mode_trains():
    """The same of the constructor, which draws and quantizes."""
    with torch.inference_mode():
        layer = nf4.QuantLinear(64, 64, lora=CONFIG, dtype=torch.float32)
    assert all(g is not None for g in trained(layer))


@pytest.mark.parametrize("what", ["load_checkpoint", "load_adapters", "load_state_dict"])
def test_what_is_loaded_in_inference_mode_trains(tmp_path, what):
    """The same of loaders."""
    source = nn.Sequential(nn.Linear(64, 64))
    nf4.quantize_model(source, lora=CONFIG, progress=False)
    nf4.save_checkpoint(source, tmp_path / "a")
    nf4.save_adapters(source, tmp_path)
    model = nn.Sequential(nn.Linear(64, 64))
    if what != "load_checkpoint":
        nf4.quantize_model(model, lora=CONFIG if what == "load_state_dict" else None, progress=False)
    with torch.inference_mode():
        if what == "load_checkpoint":
            nf4.load_checkpoint(model, tmp_path / "a")
        elif what == "load_adapters":
            nf4.load_adapters(model, tmp_path)
        else:
            model.load_state_dict(source.state_dict())
    assert all(g is not None for g in trained(model))


def test_a_model_merged_in_inference_mode_trains():
    """The same of merging."""
    model = nn.Sequential(nn.Linear(64, 64))
    nf4.quantize_model(model, lora=CONFIG, progress=False)
    with torch.inference_mode():
        nf4.merge_model(model)
    model(X.to(model[0].weight.dtype)).sum().backward()
    assert model[0].weight.grad is not None


def test_a_forward_in_inference_mode_leaves_the_model_trainable():
    """Kept right: evaluation between two steps."""
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    nf4.quantize_model(model, lora=CONFIG, progress=False)
    ids = torch.arange(10).view(2, 5)
    with torch.inference_mode():
        model(ids)
    assert all(g is not None for g in trained(model, ids))


def test_a_model_moved_and_cast_in_inference_mode_trains():
    model = nn.Sequential(nn.Linear(64, 64))
    nf4.quantize_model(model, lora=CONFIG, progress=False)
    with torch.inference_mode():
        model.to(torch.float64).to(torch.float32)
        model.to("meta")
        model.to_empty(device="cpu")
        model[0].reset_parameters()
    assert all(g is not None for g in trained(model))


def test_experts_quantized_in_inference_mode_pass_gradients():
    with torch.inference_mode():
        gate_up, down = nf4.quantize_experts(torch.randn(2, 128, 64)), nf4.quantize_experts(torch.randn(2, 64, 64))
        experts = nf4.QuantExperts(gate_up, down, nn.functional.silu)
    x = X.clone().requires_grad_()
    experts(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)).sum().backward()
    assert x.grad.any()


def test_linear_of_a_weight_from_inference_mode_trains():
    with torch.inference_mode():
        qweight = nf4.quantize(torch.randn(32, 64))
    x = X.clone().requires_grad_()
    nf4.linear(x, qweight).sum().backward()
    assert x.grad.any()
    assert not torch.is_inference_mode_enabled()


def test_grad_mode_is_off_while_inference_mode_is_left():
    """As inside inference mode: nothing is recorded."""
    with torch.inference_mode():
        layer = nf4.QuantLinear(64, 64, lora=CONFIG, dtype=torch.float32)
        layer.set_qweight(layer.qweight)
        assert torch.is_inference_mode_enabled()
    assert all(p.grad_fn is None and not p.is_inference() for p in [*layer.parameters(), *layer.buffers()])
