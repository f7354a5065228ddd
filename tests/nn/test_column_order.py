"""A layer whose bytes have Ŵ's columns in another order, as GPTQ's act-order leaves them: as any other from outside."""

import copy
from dataclasses import replace

import pytest
import torch

import nf4kernels as nf4

N, K, R = 24, 128, 4


def ordered():
    """(the weight, Ŵ in fp32 in the order of its columns)."""
    qweight = nf4.quantize(torch.randn(N, K), codebook="int4_symmetric", block_size=32)
    order = torch.randperm(K, dtype=torch.int32)
    dense = torch.empty(N, K)
    dense[:, order.long()] = nf4.dequantize(qweight, torch.float32)
    return replace(qweight, column_order=order), dense


@pytest.fixture
def weight():
    return ordered()


def layer_of(qweight, bias=True):
    return nf4.QuantLinear.from_quantized(qweight, torch.nn.Parameter(torch.randn(N)) if bias else None)


def test_dequantize_gives_any_range_in_order(weight):
    qweight, dense = weight
    assert torch.equal(nf4.dequantize(qweight, torch.float32), dense)
    part = nf4.dequantize(qweight, torch.float32, rows=(3, 9), cols=(17, 80))
    assert torch.equal(part, dense[3:9, 17:80])
    out = torch.empty(6, 63)
    assert nf4.dequantize(qweight, out=out, rows=(3, 9), cols=(17, 80)) is out
    assert torch.equal(out, dense[3:9, 17:80])


def test_linear_and_its_gradient(weight):
    qweight, dense = weight
    x = torch.randn(2, 5, K, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = nf4.linear(x, qweight), twin @ dense.T
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    with pytest.raises(ValueError, match=r"x must have K=128 columns, got shape \[3, 256\]"):
        nf4.linear(torch.randn(3, 2 * K), qweight)


def test_an_adapter_has_the_columns_in_order(weight):
    qweight, dense = weight
    layer = layer_of(qweight)
    layer.add_lora(nf4.LoraConfig(r=R, alpha=2 * R), dtype=torch.float32)
    layer.lora_B.weight.data.normal_()
    x = torch.randn(5, K, requires_grad=True)
    A, B = (factor.weight.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), twin @ dense.T + layer.bias + 2 * twin @ A.T @ B.T
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in ((x, twin), (layer.lora_A.weight, A), (layer.lora_B.weight, B)):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-3, rtol=1e-4)
    merged = layer.to_linear(torch.float32)
    torch.testing.assert_close(merged.weight, dense + 2 * (layer.lora_B.weight @ layer.lora_A.weight))


def test_dropout_is_over_the_columns_of_x(weight):
    """A's gradient tells which columns of x were kept: those whose term is in y."""
    qweight, dense = weight
    layer = layer_of(qweight, bias=False)
    layer.add_lora(nf4.LoraConfig(r=R, alpha=R, dropout=0.5), dtype=torch.float32)
    layer.lora_B.weight.data.normal_()
    x = torch.randn(K)
    y = layer(x[None])[0]
    y.sum().backward()
    A, B = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
    kept = layer.lora_A.weight.grad[0] != 0
    assert 0 < kept.sum() < K
    torch.testing.assert_close(y.detach(), dense @ x + B @ (A @ (2 * kept * x)), atol=1e-4, rtol=1e-4)


def test_it_lives_as_any_layer(weight, tmp_path):
    qweight, dense = weight
    layer = layer_of(qweight)
    assert torch.equal(layer.qweight.column_order, qweight.column_order)
    x = torch.randn(3, K)
    for other in (copy.deepcopy(layer), torch.compile(layer, backend="eager", fullgraph=True)):
        torch.testing.assert_close(other(x), x @ dense.T + layer.bias)
    assert layer.type(torch.float32).column_order.dtype == torch.int32
    meta = layer_of(qweight.to("meta"))
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta.dequantize(torch.float32), dense)
    plain = layer_of(nf4.quantize(torch.randn(N, K), codebook="int4_symmetric", block_size=32))
    with pytest.raises(RuntimeError, match="column_order"):
        plain.load_state_dict(layer.state_dict())
    model = torch.nn.Sequential(layer)
    nf4.save_checkpoint(model, tmp_path / "a.safetensors")
    again = torch.nn.Sequential(torch.nn.Linear(K, N))
    nf4.load_checkpoint(again, tmp_path / "a.safetensors")
    assert torch.equal(again[0].dequantize(torch.float32), dense)


def test_what_cannot_be_an_order_is_refused(weight):
    qweight, _ = weight
    for order in (torch.arange(K), torch.arange(K - 1, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"column_order must be int32 \[128\], got"):
            replace(qweight, column_order=order)
    with pytest.raises(ValueError, match="permuted columns"):
        nf4.weight_to_tensors(qweight, bitsandbytes=True)


def test_a_state_is_taken_with_its_order_or_not_at_all(weight):
    """Also where strict=False lets names be missing or unknown."""
    qweight, dense = weight
    ordered_layer, plain = layer_of(qweight), layer_of(replace(qweight, column_order=None))
    layer_of(replace(qweight, column_order=qweight.column_order.flip(0))).load_state_dict(ordered_layer.state_dict())
    for layer, other, sentence in (
        (plain, ordered_layer, "column_order: this layer has its columns in order"),
        (ordered_layer, plain, "column_order must be there, since this layer has it, got none"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            layer.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(ordered_layer.dequantize(torch.float32), dense)


def test_an_order_that_is_no_permutation_is_refused():
    qweight, _ = ordered()
    layer, state = layer_of(qweight), layer_of(qweight).state_dict()
    state["column_order"] = state["column_order"].clone()
    state["column_order"][1] = state["column_order"][0]
    with pytest.raises(RuntimeError, match="column_order must be a permutation of the"):
        layer.load_state_dict(state)


def test_it_trains_where_inference_mode_made_it_and_is_emptied_from_meta():
    with torch.inference_mode():
        qweight, _ = ordered()
        layer = layer_of(qweight)
    x = torch.randn(2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any()
    emptied = layer.to("meta").to_empty(device="cpu")
    assert emptied.column_order.device.type == "cpu"
    assert emptied.half().column_order.dtype == torch.int32
