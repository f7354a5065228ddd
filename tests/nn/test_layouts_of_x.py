"""Kept right: fourteen odd layouts of x give the numbers of a contiguous copy, forward and backward."""

import pytest
import torch

import nf4kernels as nf4

K, N = 64, 48
LAYOUTS = {
    "contiguous": lambda: torch.randn(6, K),
    "transposed": lambda: torch.randn(K, 6).T,
    "every other row": lambda: torch.randn(12, K)[::2],
    "every other column": lambda: torch.randn(6, 2 * K)[:, ::2],
    "part of a row": lambda: torch.randn(6, 3 * K)[:, K : 2 * K],
    "an odd offset": lambda: torch.randn(6 * K + 1)[1:].view(6, K),
    "expanded rows": lambda: torch.randn(1, K).expand(6, K),
    "expanded columns": lambda: torch.randn(6, 1).expand(6, K),
    "permuted batch": lambda: torch.randn(3, 2, K).transpose(0, 1),
    "permuted 4-D": lambda: torch.randn(2, 4, 3, K).permute(2, 0, 1, 3),
    "channels last": lambda: torch.randn(2, 3, 4, K).to(memory_format=torch.channels_last),
    "flipped": lambda: torch.randn(6, K).flip(0, 1),
    "overlapping windows": lambda: torch.randn(6 + K).unfold(0, K, 1),
    "one vector": lambda: torch.randn(2 * K)[::2],
    "no rows": lambda: torch.randn(0, 3, K),
    "zero strides": lambda: torch.zeros(1).as_strided((6, K), (0, 0)),
    "diagonal": lambda: torch.randn(6, 6, K).diagonal(dim1=0, dim2=1).T,
}


@pytest.mark.parametrize("lora", [None, nf4.LoraConfig(r=4, init="gaussian")], ids=["plain", "lora"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_changes_nothing(name, lora):
    """Report's kind: a view of x read as if it were contiguous."""
    layer = nf4.QuantLinear(K, N, lora=lora, dtype=torch.float32)
    if lora is not None:
        torch.nn.init.normal_(layer.lora_B.weight)
    x = LAYOUTS[name]()
    plain = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    odd = x.detach().requires_grad_()
    expected, got = layer(plain), layer(odd)
    assert torch.equal(got, expected)
    dy = torch.randn(expected.shape)
    expected.backward(dy)
    got.backward(dy.transpose(0, -1).contiguous().transpose(0, -1))
    torch.testing.assert_close(odd.grad, plain.grad, rtol=0, atol=0)
