"""torch.compile(fullgraph=True): no graph break, no change of the numbers, with gradients and dynamic shapes."""

import functools

import pytest
import torch
from support import cases
from support.cases import Layout, dtype_id

from nf4kernels import LoraConfig, QuantLinear, dequantize, linear, lora_linear, quantize

# Inductor runs once or twice, because it calls the C++ compiler; aot_eager traces and differentiates the same graph.
BACKENDS = ("aot_eager", "inductor")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function, leaves):
    """(y, gradient of each leaf) with fresh leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = function(*leaves)
    y.backward(torch.ones_like(y))
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_functions_with_gradients(dtype, backend):
    qweight = cases.quantized(37, 100)
    leaves = [torch.randn(s).to(dtype) for s in ((6, 100), (4, 100), (37, 4), (37,))]

    def function(x, A, B, bias):
        return linear(x, qweight, bias) + lora_linear(x, qweight, A, B, 0.5, bias)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for eager, traced in zip(run(function, leaves), run(compiled, leaves)):
        assert eager.dtype == traced.dtype
        # The same ops in the same order; a fused sum of two bf16 results may skip one rounding.
        torch.testing.assert_close(traced, eager, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_quantize_and_dequantize():
    w = cases.weight(48, 128)

    def function(w):
        qweight = quantize(w, nonfinite="propagate", double_quant=False)
        return qweight.packed, dequantize(qweight, torch.float32)

    eager, traced = function(w), torch.compile(function, fullgraph=True, backend="aot_eager")(w)
    for a, b in zip(eager, traced):
        assert torch.equal(a, b)


def test_dequantize_out_is_seen_as_a_write():
    qweight = cases.quantized(48, 128)

    def function(out):
        dequantize(qweight, out=out)
        return out + 1

    expected = cases.dense(qweight)
    for backend in BACKENDS:
        out = torch.zeros(48, 128)
        result = torch.compile(function, fullgraph=True, backend=backend)(out)
        assert torch.equal(out, expected)
        assert torch.equal(result, expected + 1)


@pytest.mark.parametrize(
    "lora", [None, LoraConfig(r=4), LoraConfig(r=4, dropout=0.5)], ids=["plain", "lora", "dropout"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quant_linear(backend, lora):
    layer = QuantLinear(100, 37, lora=lora, dtype=torch.float32)
    if lora is not None:
        torch.nn.init.normal_(layer.lora_B.weight)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for mode in (True, False):
        layer.train(mode)
        x = torch.randn(6, 100, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert y.shape == (6, 37)
        if lora is None or lora.dropout == 0 or not mode:
            expected = layer(x)
            torch.testing.assert_close(y, expected, rtol=2**-20, atol=2**-20)
        assert x.grad.isfinite().all()
    if lora is not None:
        assert layer.lora_A.weight.grad.isfinite().all()


def test_dropout_mask_is_one_in_a_compiled_step():
    K = 128
    zero = cases.from_parts(
        torch.full((K, K // 2), 0x77, dtype=torch.uint8), torch.zeros(K, K // 64), (K, K), Layout(scale_codebook=None)
    )
    x = torch.ones(64, K, requires_grad=True)
    compiled = torch.compile(
        lambda x, A, B: lora_linear(x, zero, A, B, 1.0, None, 0.5), fullgraph=True, backend="inductor"
    )
    y = compiled(x, torch.eye(K), torch.eye(K))
    y.backward(torch.ones_like(y))
    assert torch.equal(y.detach(), x.grad), "ones in: output and gradient are both the mask, doubled"
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_dynamic_batch_compiles_once():
    layer = QuantLinear(100, 37, lora=LoraConfig(r=4))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for M in (6, 17, 2, 129):
        x = torch.randn(M, 100, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_model_of_layers_recompiles_for_no_layer():
    """Equal layers share one graph each for train and eval; weights are inputs, not constants."""
    model = torch.nn.Sequential(*(QuantLinear(64, 64, lora=LoraConfig(r=4)) for _ in range(4)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(6, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_()
        compiled(x)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_()
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


def test_autocast_inside_and_outside():
    layer = QuantLinear(100, 37)
    x = torch.randn(6, 100)

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert compiled(x).dtype == torch.bfloat16
    assert torch.equal(compiled(x), inside(x))
    outside = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outside(x), inside(x))


def test_checkpoint_inside_a_compiled_function():
    layer = QuantLinear(64, 64, lora=LoraConfig(r=4), dtype=torch.float32)
    torch.nn.init.normal_(layer.lora_B.weight)
    block = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
    x = torch.randn(6, 64)
    gradients = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        function(x.clone().requires_grad_()).sum().backward()
        gradients.append(layer.lora_A.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=2**-20, atol=2**-20)
