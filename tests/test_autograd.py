"""Where autograd meets the rest of torch: reused outputs, autocast, zero sizes, dynamic shapes."""

import pytest
import torch

import nf4kernels as nf4


@pytest.fixture
def qweight():
    return nf4.quantize(torch.randn(32, 64))


def test_backward_through_an_overwritten_out_is_refused(qweight):
    out = torch.empty(32, 64)
    x = torch.randn(4, 64, requires_grad=True)
    y = x @ nf4.dequantize(qweight, out=out).T
    nf4.dequantize(qweight, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_out_that_requires_a_gradient_is_refused(qweight):
    out = torch.zeros(32, 64, requires_grad=True)
    with pytest.raises(ValueError, match="out must not require a gradient"):
        nf4.dequantize(qweight, out=out)
    assert not out.any()


def test_autocast_around_backward_does_not_change_it(qweight):
    x = torch.randn(4, 64)
    gradients = []
    for around in (False, True):
        leaves = [x.clone(), torch.randn(4, 64, generator=torch.manual_seed(0)), torch.randn(32, 4)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            with torch.autocast("cpu", enabled=False):
                y = nf4.lora_linear(leaves[0], qweight, leaves[1], leaves[2], 1.0)
            y.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for plain, under_autocast in zip(*gradients):
        assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("shape", [(0, 64), (32, 0)], ids=lambda s: f"N{s[0]}-K{s[1]}")
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_zero_sizes_have_gradients(shape, leading):
    N, K = shape
    qweight = nf4.quantize(torch.randn(N, K))
    x = torch.randn(*leading, K, requires_grad=True)
    A, B, bias = (torch.randn(*s, requires_grad=True) for s in ((4, K), (N, 4), (N,)))
    y = nf4.lora_linear(x, qweight, A, B, 1.0, bias, dropout_p=0.1) + nf4.linear(x, qweight, bias)
    assert torch.equal(y, (2 * bias).expand_as(y))
    y.sum().backward()
    rows = torch.ones(leading).numel()
    assert torch.equal(bias.grad, torch.full((N,), 2.0 * rows))
    for leaf in (x, A, B):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("bias", [False, True])
def test_compiles_with_dynamic_shapes_and_a_weight_as_argument(qweight, bias):
    b = torch.randn(32, requires_grad=True) if bias else None
    compiled = torch.compile(lambda x, q: nf4.linear(x, q, b), dynamic=True, fullgraph=True)
    for M in (4, 6):
        x = torch.randn(M, 64, requires_grad=True)
        eager = x.detach().clone().requires_grad_()
        y, expected = compiled(x, qweight), nf4.linear(eager, qweight, b)
        (y.sum() + 0).backward()
        expected.sum().backward()
        assert torch.equal(y, expected)
        assert torch.equal(x.grad, eager.grad)


def test_a_product_of_sizes_beyond_63_bits_is_refused():
    tensors = (torch.zeros(64, dtype=torch.uint8), torch.zeros(2), None, None, torch.zeros(16), None)
    with pytest.raises(RuntimeError):
        torch.ops.nf4kernels.dequantize(*tensors, 6148914691236517248, 3, 64, 0, 1, 0, 1, torch.float32)
