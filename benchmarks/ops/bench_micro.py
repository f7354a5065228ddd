"""What a call costs where there is little to compute: SmolLM2-135M's layers beside nn.Linear, by pytest-benchmark."""

import pytest
import torch

import nf4kernels as nf4

from ..checks import assert_as_exact_as_dense

SHAPES = ((576, 576), (192, 576), (1536, 576))


@pytest.mark.parametrize("side", ["QuantLinear", "nn.Linear"])
@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("M", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_call(benchmark, shape, M, gradient, side):
    """One forward; with a gradient its backward to x too."""
    N, K = shape
    benchmark.group = f"{N}x{K}, M={M}, {'forward and backward to x' if gradient else 'forward without gradient'}"
    dense = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    quantized = nf4.QuantLinear.from_linear(dense)
    x, dy = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(M, N, dtype=torch.bfloat16)
    assert_as_exact_as_dense(quantized(x), x, quantized.dequantize(torch.float32).T, f"linear {N}x{K}")
    layer = quantized if side == "QuantLinear" else dense
    if gradient:
        x.requires_grad_()
        benchmark(lambda: torch.autograd.grad(layer(x), x, dy))
    else:
        with torch.no_grad():
            benchmark(layer, x)
