"""Fake quantization: the bits of dequantize(quantize(w)), the gradient of the weight itself, the product's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import nf4kernels as nf4
from nf4kernels.recover import FakeQuantLinear, fake_quantize
from nf4kernels.recover.fake_quantize import beyond_levels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = torch.linspace(-0.9, 0.8, 16)  # ends before 1, so that weights saturate
OPTIONS = [
    {"codebook": codebook, "block_size": block_size, "double_quant": double_quant}
    for codebook in ("nf4", "fp4", "int4", "af4", LEVELS)
    for block_size in (32, 64)
    for double_quant in (True, False)
] + [
    {"codebook": "int8"},
    {"codebook": "mxfp4"},
    {"codebook": "nvfp4"},
    {"codebook": "int4_symmetric", "block_size": 32},
]
SHAPES = ((8, 96), (5, 37))  # K is a multiple of no block in the second


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(N, K, dtype=torch.float32, bias=True):
    linear = nn.Linear(K, N, bias, dtype=dtype)
    linear.weight.data.copy_(drawn(N, K))
    if bias:
        linear.bias.data.copy_(drawn(N, seed=1))
    return linear


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_and_gradient(options, shape):
    for dtype in DTYPES:
        w = drawn(*shape, dtype=dtype).requires_grad_()
        fake = fake_quantize(w, **options)
        assert fake.dtype == dtype
        assert torch.equal(fake, nf4.dequantize(nf4.quantize(w, **options), dtype))
        assert not torch.equal(fake, w)
        dy = drawn(*shape, dtype=dtype, seed=2)
        fake.backward(dy)
        assert torch.equal(w.grad, dy)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_converted_layer_is_the_layer(options):
    for (N, K), dtype, bias in zip(SHAPES * 2, (*DTYPES, torch.float32), (True, False, True, True)):
        linear = layer(N, K, dtype, bias)
        fake = FakeQuantLinear(linear, **options)
        for each in (fake, FakeQuantLinear(linear, nf4.LoraConfig(r=3, alpha=6), **options)):
            if each.lora is not None:
                each.lora_B.weight.data.copy_(0.1 * drawn(N, 3, seed=4))
            converted = each.to_quant_linear()
            assert torch.equal(converted.dequantize(dtype), fake_quantize(each.merged(), **options))
            assert torch.equal(converted.dequantize(dtype), each.dequantize())
            for x in (drawn(3, 2, K, dtype=dtype), drawn(40, K, dtype=dtype, seed=5)):
                assert torch.equal(converted(x), each(x))


def test_product_and_gradients_of_the_weight_in_fp32():
    linear = layer(24, 80)
    fake, x = FakeQuantLinear(linear), drawn(7, 80, seed=3).requires_grad_()
    y = fake(x)
    y.backward(drawn(7, 24, seed=6))
    got = [x.grad, linear.weight.grad, linear.bias.grad]
    W, bias, x64 = (t.detach().double().requires_grad_() for t in (linear.weight, linear.bias, x))
    expected = functional.linear(x64, _straight(W, fake.dequantize()), bias)
    expected.backward(drawn(7, 24, seed=6).double())
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(got, (x64.grad, W.grad, bias.grad)):
        assert torch.allclose(grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_gradients_of_a_merged_adapter(clip):
    linear = layer(24, 80)
    options = {"codebook": LEVELS, "double_quant": False}
    fake = FakeQuantLinear(linear, nf4.LoraConfig(r=4, alpha=12), clip=clip, **options)
    fake.lora_B.weight.data.copy_(drawn(24, 4, seed=8))
    x = drawn(7, 80, seed=3)
    fake(x).backward(drawn(7, 24, seed=6))
    assert linear.weight.grad is None
    A, B = (factor.weight.detach().double().requires_grad_() for factor in (fake.lora_A, fake.lora_B))
    merged = linear.weight.double() + 3 * B @ A
    if clip:
        outside = beyond_levels(fake.merged(), nf4.quantize(fake.merged(), **options))
        assert 0 < outside.sum() < outside.numel() / 4
        merged = torch.where(outside, merged.detach(), merged)
    functional.linear(x.double(), _straight(merged, fake.dequantize())).backward(drawn(7, 24, seed=6).double())
    for factor, wanted in ((fake.lora_A, A), (fake.lora_B, B)):
        assert torch.allclose(factor.weight.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


def test_clip_stops_what_saturates_and_nothing_else():
    w = torch.zeros(1, 64)
    w[0, :4] = torch.tensor([1.0, 0.85, -1.0, 0.5])
    w.requires_grad_()
    fake_quantize(w, clip=True, codebook=LEVELS, double_quant=False).sum().backward()
    assert (w.grad == 0).nonzero()[:, 1].tolist() == [0, 1, 2]  # 0.85 is above the last level, 0.8
    w.grad = None
    fake_quantize(w, clip=True, double_quant=False).sum().backward()
    assert bool((w.grad == 1).all()), "NF4's levels end at 1, and the scale is the largest weight"


def test_the_master_is_rounded_from_its_own_dtype_under_autocast():
    linear = layer(32, 64)
    fake, x = FakeQuantLinear(linear), drawn(9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = fake(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, fake.to_quant_linear()(x))
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    assert not torch.equal(fake.dequantize(), fake_quantize(linear.weight.detach().bfloat16()).float())


def test_a_small_adapter_is_merged_in_fp32_under_autocast():
    fake, x = FakeQuantLinear(layer(32, 64), nf4.LoraConfig(r=4)), drawn(9, 64)
    fake.lora_B.weight.data.copy_(drawn(32, 4, seed=8) * 1e-3)
    converted, merged = fake.to_quant_linear(), fake.merged()
    assert not torch.equal(merged.bfloat16(), fake.weight.bfloat16()), "or bf16 would not have lost it"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fake.merged(), merged)
        assert torch.equal(fake(x), converted(x))


def test_compute_dtype_is_the_converted_layers():
    fake, x = FakeQuantLinear(layer(32, 64), compute_dtype=torch.bfloat16), drawn(9, 64)
    assert torch.equal(fake(x), fake.to_quant_linear()(x))
    assert fake(x).dtype == torch.float32
    assert not torch.equal(fake(x), FakeQuantLinear(layer(32, 64))(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(use_reentrant):
    grads = []
    for is_checkpointed in (False, True):
        linear, x = layer(32, 64), drawn(9, 64).requires_grad_()
        fake = FakeQuantLinear(linear)
        y = checkpoint(fake, x, use_reentrant=use_reentrant) if is_checkpointed else fake(x)
        y.square().sum().backward()
        grads.append((linear.weight.grad, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_backward_keeps_no_second_weight():
    kept = []
    fake = FakeQuantLinear(layer(64, 128))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake(drawn(4, 128).requires_grad_())
    own = {fake.weight.data_ptr(), fake.bias.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == 4 * 128, "x alone, or its copy"


def test_what_is_refused():
    linear = layer(8, 64)
    with pytest.raises(ValueError, match=r"lora_merged must have dropout 0, since it is merged, got 0.1"):
        FakeQuantLinear(linear, nf4.LoraConfig(dropout=0.1))
    with pytest.raises(ValueError, match=r"lora_merged must start at zero .*got init='pissa'"):
        FakeQuantLinear(linear, nf4.LoraConfig(init="pissa"))
    with pytest.raises(ValueError, match="codebook must be one of"):
        FakeQuantLinear(linear, codebook="nf5")
    assert linear.weight.requires_grad
    with pytest.raises(TypeError, match="weight must be a float32"):
        fake_quantize(torch.zeros(2, 2, dtype=torch.float64))
    linear.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="got nan at row 1, column 2"):
        fake_quantize(linear.weight)


def _straight(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values forward, the identity backward."""
    return weight + (values.double() - weight).detach()
