"""Hooks, parametrizations, other classes and offloading of lora_A and lora_B: there the factors are called."""

import pytest
import torch
from support import tiny
from support.offload import HOW, offloaded
from torch import nn
from torch.nn.utils import parametrize

import nf4kernels as nf4

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
CONFIG = nf4.LoraConfig(r=4, init="gaussian")


@pytest.fixture
def layer():
    layer = nf4.QuantLinear(64, 64, lora=CONFIG, dtype=torch.float32)
    return tiny.fill_adapters(layer)


def term(layer):
    return layer(X) - nf4.linear(X, layer.qweight, layer.bias)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_a_factor_fires(layer, factor, kind):
    """Interpretability and logging tools hook every module."""
    seen = []
    register = getattr(getattr(layer, factor), f"register_{kind}_hook")
    handle = register(lambda module, *_: seen.append(module))
    layer(X.clone().requires_grad_()).sum().backward()
    assert seen == [getattr(layer, factor)]
    handle.remove()
    layer(X)
    assert len(seen) == 1


def test_a_hook_may_change_what_a_factor_gives(layer):
    """An ablation of the adapter."""
    layer.lora_B.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert torch.equal(layer(X), nf4.linear(X, layer.qweight, layer.bias))


def test_a_global_hook_sees_the_factors(layer):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(X)
    finally:
        handle.remove()
    assert seen == [layer.lora_A, layer.lora_B, layer]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_two_ways_give_the_same_numbers(dropout):
    """Through the children or past them: the same to rounding, gradients too, under the same mask."""
    config = nf4.LoraConfig(r=4, init="gaussian", dropout=dropout)
    layer = tiny.fill_adapters(nf4.QuantLinear(64, 64, lora=config, dtype=torch.float32))
    x = X.clone().requires_grad_()
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        gradients = (p.grad.clone() for p in (x, layer.bias, layer.lora_A.weight, layer.lora_B.weight))
        results.append([y.detach(), *gradients])
        layer.lora_A.register_forward_hook(lambda *_: None)
    for got, expected in zip(*results):
        # Sums of at most 64 terms in fp32, in another order, twice.
        torch.testing.assert_close(got, expected, rtol=0, atol=2 * 64 * 2**-24 * expected.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_activations_and_fp32_factors(autocast):
    layer = tiny.fill_adapters(nf4.QuantLinear(64, 64, dtype=torch.bfloat16))
    layer.add_lora(CONFIG, dtype=torch.float32)
    tiny.fill_adapters(layer)
    x = X if autocast else X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused = layer(x)
        layer.lora_B.register_forward_hook(lambda *_: None)
        called = layer(x)
    assert fused.dtype == called.dtype == torch.bfloat16
    # Roundings to bf16 of the product, of the term and its parts, and of the sum.
    atol = 4 * 2**-8 * fused.abs().max().item()
    torch.testing.assert_close(called, fused, rtol=0, atol=atol)
    called.sum().backward()
    assert layer.lora_A.weight.grad.dtype == torch.float32


def test_a_parametrized_factor_is_used_as_it_is(layer):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    whole = term(layer)
    parametrize.register_parametrization(layer.lora_B, "weight", Half())
    torch.testing.assert_close(term(layer), whole / 2, rtol=1e-4, atol=1e-5)
    layer(X).sum().backward()
    assert layer.lora_B.parametrizations.weight.original.grad is not None


def test_a_replaced_factor_is_called(layer):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    once = term(layer)
    twice = Twice(64, 4, bias=False)
    twice.weight = layer.lora_A.weight
    layer.lora_A = twice
    torch.testing.assert_close(term(layer), 2 * once, rtol=1e-4, atol=1e-5)


def test_a_bias_on_a_factor_counts(layer):
    once = term(layer)
    layer.lora_B.bias = nn.Parameter(torch.ones(64))
    torch.testing.assert_close(term(layer), once + CONFIG.scaling, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [None, CONFIG], ids=["plain", "adapters"])
@pytest.mark.parametrize("how", HOW)
def test_an_offloaded_model_gives_the_same_numbers(tmp_path, how, lora):
    """device_map="auto" with too little memory: the tensors are on meta between the forwards."""
    model = tiny.fill_adapters(tiny.quantized_llama(lora=lora))
    with torch.no_grad():
        expected = model(tiny.IDS).logits
        model = offloaded(model, how, tmp_path)
        got = model(tiny.IDS).logits
    torch.testing.assert_close(got, expected)
    if lora is not None:
        with torch.no_grad(), nf4.disable_adapters(model):
            assert torch.equal(model(tiny.IDS).logits, tiny.quantized_llama()(tiny.IDS).logits)


@pytest.mark.parametrize("how", HOW)
def test_adapters_of_an_offloaded_model_are_saved(tmp_path, how):
    """Also what was trained beside them."""
    model = tiny.fill_adapters(tiny.quantized_llama(lora=CONFIG)).requires_grad_(False)
    model.model.norm.requires_grad_(True)
    nf4.save_adapters(model, tmp_path / "before")
    nf4.save_adapters(offloaded(model, how, tmp_path), tmp_path / "after")
    before, after = ((tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("before", "after"))
    assert before == after


def test_an_offloaded_layer_takes_no_adapter(tmp_path):
    """Its factors would be on meta, without a hook that fetches them."""
    layer = next(iter(tiny.layers(offloaded(tiny.quantized_llama(), "cpu_offload", tmp_path)).values()))
    with pytest.raises(ValueError, match="add_lora: the layer must not be offloaded yet"):
        layer.add_lora(CONFIG)


@pytest.mark.parametrize("how", HOW)
def test_a_dispatched_dense_model_is_refused(tmp_path, how):
    """It had 0 layers replaced, in silence; one in 4 bits already is left as it is."""
    with pytest.raises(ValueError, match=r"quantize_model: model must not be dispatched or offloaded"):
        nf4.quantize_model(offloaded(tiny.llama(), how, tmp_path), progress=False)
    report = nf4.quantize_model(offloaded(tiny.quantized_llama(), how, tmp_path), progress=False)
    assert not report.layers
