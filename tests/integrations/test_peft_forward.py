"""PEFT's LoRA on a QuantLinear: one fused op, forward and backward, with PEFT's numbers and PEFT's meaning."""

import copy
import pickle

import pytest
import torch
from support import cases
from support.numerics import assert_product_within_bound
from support.peft_layers import K, N, adapted, dense, peft, peft_forward, quantized, sum_of_weights
from torch import nn

import nf4kernels as nf4
from nf4kernels import functional
from nf4kernels.integrations.peft import LoraQuantLinear


@pytest.fixture
def fused(monkeypatch):
    """How often the fused LoRA product and the plain one ran."""
    counts = {"lora": 0, "plain": 0}
    from nf4kernels.nn import quant_linear

    for key, name in (("lora", "lora_linear_from_args"), ("plain", "linear_from_args")):
        original = getattr(functional, name)

        def counting(*args, key=key, original=original):
            counts[key] += 1
            return original(*args)

        monkeypatch.setattr(quant_linear, name, counting)
    return counts


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_forward_is_one_op_within_the_bound(fused, dtype, options):
    _, layer = adapted(quantized(dtype), **options)
    x = torch.randn(13, K, dtype=dtype)
    y = layer(x)
    assert fused == {"lora": 1, "plain": 0}
    assert layer.lora_A["default"].weight.dtype == torch.float32
    if not options.get("use_dora"):
        bias = layer.base_layer.bias.float()
        assert_product_within_bound(y, x, sum_of_weights(layer).T.float(), "fused LoRA", bias)
    theirs = peft_forward(layer, x)
    assert theirs.dtype == y.dtype
    eps = torch.finfo(dtype).eps
    # Both round the product, and PEFT its parts as well: three roundings of the sum of both magnitudes.
    assert (y - theirs).double().norm() <= 3 * eps * theirs.double().norm()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def test_gradients_are_peft_s(options):
    _, layer = adapted(quantized(), **options)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert {"lora_A.default.weight", "lora_B.default.weight"} <= set(parameters)
    x = torch.randn(13, K, requires_grad=True)
    dy = torch.randn(13, N)
    inputs = [x, *parameters.values()]
    ours = torch.autograd.grad(layer(x), inputs, dy)
    theirs = torch.autograd.grad(peft_forward(layer, x), inputs, dy)
    for name, our, their in zip(["x", *parameters], ours, theirs):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=2**-18, atol=2**-18 * their.abs().max().item(), msg=name)


def test_gradients_of_fp32_adapters_under_bf16_x_are_fp32():
    _, layer = adapted(quantized(torch.bfloat16))
    layer(torch.randn(5, K, dtype=torch.bfloat16)).sum().backward()
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        assert factor.weight.dtype == factor.weight.grad.dtype == torch.float32
    assert layer.base_layer.weight.dtype == torch.uint8


def test_without_autocast_of_adapters_they_have_the_layer_s_dtype():
    for option, expected in ((True, torch.float32), (False, torch.bfloat16)):
        for base in (quantized(torch.bfloat16), dense(torch.bfloat16)):
            _, layer = adapted(base, autocast_adapter_dtype=option)
            assert layer.lora_A["default"].weight.dtype == expected
    _, layer = adapted(quantized(compute_dtype=torch.bfloat16), autocast_adapter_dtype=False)
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16


def test_dropout_is_on_the_adapter_s_path_alone(fused):
    model, layer = adapted(quantized(), lora_dropout=0.5)
    x = torch.randn(3, K)
    base = layer.base_layer(x)
    assert torch.equal(layer(x), layer(x)) is False
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert fused["lora"] == 402
    model.eval()
    whole = layer(x)
    assert torch.equal(layer(x), whole)
    # 400 draws of keep/0.5: each term of the sum over K has a deviation of its own size.
    term = x[:, None] * (layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    deviation = term.square().sum(-1).sqrt() / 400**0.5
    assert ((mean - whole).abs() <= 6 * deviation).all()
    assert not torch.allclose(whole, base, atol=1e-3)


def test_dora_with_dropout_trains_and_evaluates_as_peft_s():
    model, layer = adapted(quantized(), lora_dropout=0.25, use_dora=True)
    x = torch.randn(6, K)
    torch.manual_seed(3)
    ours = layer(x)
    reference = copy.deepcopy(layer)
    reference.base_layer = reference.base_layer.to_linear()  # PEFT's own on a dense layer of the same weight
    reference.__class__ = peft.tuners.lora.Linear
    torch.manual_seed(3)
    torch.testing.assert_close(ours, reference(x), rtol=1e-4, atol=1e-4)
    model.eval()
    reference.eval()
    torch.testing.assert_close(layer(x), reference(x), rtol=1e-4, atol=1e-4)


def test_disabled_adapters_are_the_base(fused):
    model, layer = adapted(quantized())
    x = torch.randn(4, K)
    expected = layer.base_layer(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(x), expected)
    model.base_model.enable_adapter_layers()
    assert not torch.equal(model(x), expected)


def test_several_adapters(fused):
    model, layer = adapted(quantized(), names=("default", "other"))
    x = torch.randn(4, K)
    first = model(x)
    model.set_adapter("other")
    second = model(x)
    assert fused == {"lora": 2, "plain": 0}
    base = layer.base_layer(x)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), first + second - base, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.delete_adapter("other")
    assert torch.equal(model(x), first)


def test_a_batch_of_different_adapters():
    model, layer = adapted(quantized(), names=("default", "other"))
    model.eval()
    x = torch.randn(3, K)
    mixed = model(x, adapter_names=["other", "__base__", "default"])
    rows = {"default": 2}
    for name, row in (*rows.items(), ("other", 0)):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(x)[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(mixed[1], layer.base_layer(x)[1])


def test_hooks_on_the_factors_and_on_the_base_are_called(fused):
    _, layer = adapted(quantized())
    x = torch.randn(4, K)
    expected = layer(x)
    seen = []
    for module in (layer.lora_A["default"], layer.lora_B["default"], layer.base_layer):
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        handle.remove()
    assert len(seen) == 3
    torch.testing.assert_close(seen[2], layer.base_layer(x))  # the base's output, without the adapter's term
    assert fused == {"lora": 1, "plain": 4}


def test_under_autocast():
    _, layer = adapted(quantized())
    x = torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)


def test_compute_dtype_of_the_layer_holds():
    base = quantized(compute_dtype=torch.bfloat16)
    _, layer = adapted(base)
    x = torch.randn(4, K)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def test_compiles_as_one_graph(options):
    _, layer = adapted(quantized(), **options)
    x = torch.randn(4, K)
    expected = layer(x)
    expected.sum().backward()
    gradient = layer.lora_B["default"].weight.grad.clone()
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, gradient, rtol=1e-5, atol=1e-4)


def test_checkpointed_training_has_the_same_gradients():
    model, layer = adapted(quantized())
    x = torch.randn(4, K, requires_grad=True)
    weight = layer.lora_A["default"].weight
    plain = torch.autograd.grad(model(x).square().sum(), [x, weight])
    checkpointed = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum()
    for ours, expected in zip(torch.autograd.grad(checkpointed, [x, weight]), plain):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("merged", [False, True])
def test_copies(merged):
    model, layer = adapted(quantized())
    x = torch.randn(4, K)
    before = model(x)
    if merged:
        model.merge_adapter()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
        if merged:
            copied.unmerge_adapter()
            assert torch.equal(copied(x), before)
            assert isinstance(copied.base_model.model.layer.base_layer, nf4.QuantLinear)
    assert layer.merged == merged


def test_an_adapter_of_our_own_below_peft_s():
    base = quantized(lora=nf4.LoraConfig(r=4))
    nn.init.normal_(base.lora_B.weight, std=0.1)
    _, layer = adapted(base)
    x = torch.randn(4, K)
    y = layer(x)
    torch.testing.assert_close(y, peft_forward(layer, x), rtol=1e-4, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_it_is_our_layer_that_peft_makes():
    _, layer = adapted(quantized())
    assert type(layer) is LoraQuantLinear
    _, layer = adapted(dense())
    assert type(layer) is peft.tuners.lora.Linear


def test_compiled_hotswapping_scales_by_a_tensor():
    hotswap = pytest.importorskip("peft.utils.hotswap", reason="this PEFT has no hotswapping")
    model, layer = adapted(quantized())
    x = torch.randn(3, layer.in_features)
    expected = model(x)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=16)
    assert isinstance(layer.scaling["default"], torch.Tensor)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
