"""LoraConfig and how an adapter starts."""

import dataclasses
import math

import pytest
import torch
from support.numerics import assert_product_within_bound

from nf4kernels import LoraConfig, QuantLinear, autograd_lora


def test_scaling():
    assert LoraConfig(r=16, alpha=32).scaling == 2
    assert LoraConfig(r=16, alpha=32, use_rslora=True).scaling == 8
    assert LoraConfig(r=3, alpha=1, use_rslora=True).scaling == 1 / math.sqrt(3)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": -4}, "r must be at least 1, got -4"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"init": "zeros"}, "init must be .*'zeros'"),
    ],
)
def test_refuses(options, argument):
    with pytest.raises(ValueError, match=argument):
        LoraConfig(**options)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().r = 4


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_fresh_adapter_changes_nothing(init):
    layer = QuantLinear(128, 96, dtype=torch.float32)
    x = torch.randn(5, 128)
    before = layer(x)
    layer.add_lora(LoraConfig(r=4, init=init))
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.lora_B.weight, torch.zeros(96, 4))
    assert layer.lora_A.weight.count_nonzero() > 500


def test_default_start_is_peft_s():
    """kaiming_uniform with a = sqrt(5): uniform in +-1/sqrt(in_features)."""
    layer = QuantLinear(4096, 64, lora=LoraConfig(r=16), dtype=torch.float32)
    A = layer.lora_A.weight
    bound = 1 / math.sqrt(4096)
    assert A.abs().max() <= bound
    deviation = bound / math.sqrt(3)
    # The standard error of a uniform's deviation over n draws is below deviation / sqrt(n); five of them.
    assert abs(A.std().item() - deviation) < 5 * deviation / math.sqrt(A.numel())


def test_gaussian_start_is_peft_s():
    layer = QuantLinear(4096, 64, lora=LoraConfig(r=16, init="gaussian"), dtype=torch.float32)
    A = layer.lora_A.weight
    assert abs(A.std().item() - 1 / 16) < 5 / 16 / math.sqrt(2 * A.numel())
    assert abs(A.mean().item()) < 5 / 16 / math.sqrt(A.numel())


def test_start_follows_the_seed():
    def factor():
        torch.manual_seed(9)
        return QuantLinear(64, 32, lora=LoraConfig(r=4)).lora_A.weight

    assert torch.equal(factor(), factor())


@pytest.mark.parametrize(("alpha", "rslora"), [(8, False), (8, True), (0, False), (-3, False)])
def test_scaling_reaches_the_product(alpha, rslora):
    config = LoraConfig(r=4, alpha=alpha, use_rslora=rslora)
    layer = QuantLinear(64, 32, bias=False, lora=config, dtype=torch.float32)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 64)
    delta = layer(x).double() - torch.nn.functional.linear(x.double(), layer.dequantize(torch.float32).double())
    A, B = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    torch.testing.assert_close(delta, config.scaling * x.double() @ A.T @ B.T, rtol=0, atol=2**-16)
    torch.testing.assert_close(layer.lora_delta().double(), config.scaling * B @ A, rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize(
    ("M", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (4, torch.float32), (4, torch.bfloat16)], ids=str
)
def test_the_inner_product_of_few_rows_is_one_op(monkeypatch, M, dtype):
    """A decoded token's: calling a BLAS takes longer than the product."""
    calls, op = [], autograd_lora._grouped_lora_inner
    monkeypatch.setattr(autograd_lora, "_grouped_lora_inner", lambda *args: calls.append(args) or op(*args))
    x, A = torch.randn(M, 1, 576).to(dtype), torch.randn(16, 576).to(dtype)
    P = autograd_lora._lora_inner(x, A)
    assert len(calls) == 1
    assert_product_within_bound(P, x[:, 0], A.float().T, "LoRA's inner product")


def test_a_compiled_token_takes_that_op_too():
    layer = QuantLinear(64, 64, lora=LoraConfig(r=4)).eval()
    torch.nn.init.normal_(layer.lora_B.weight)
    targets = set()

    def backend(graph, example_inputs):
        targets.update(node.target for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        y = torch.compile(layer, backend=backend, fullgraph=True)(x)
        assert torch.equal(y, layer(x))
    assert torch.ops.nf4kernels.grouped_lora_inner.default in targets


@pytest.mark.parametrize("init", ["default", "pissa", "loftq"])
def test_it_starts_and_is_merged_in_fp32_under_autocast(init):
    torch.manual_seed(0)
    dense, config = torch.nn.Linear(128, 64), LoraConfig(r=4, init=init)
    layers = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer = QuantLinear.from_linear(dense, lora=config)
            with torch.no_grad():
                layer.lora_B.weight += 1e-3 * torch.randn(64, 4)
            layers.append((layer, layer.to_linear(), layer.to_linear(base_weight=dense.weight.detach())))
    (outside, *plain), (inside, *merged) = layers
    assert torch.equal(inside.lora_A.weight, outside.lora_A.weight)
    assert torch.equal(inside.weight, outside.weight)
    for got, expected in zip(merged, plain):
        assert torch.equal(got.weight, expected.weight)
