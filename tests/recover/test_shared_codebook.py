"""One codebook for many layers: found where it is known, never worse than NF4's, given to quantize_model."""

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn

import nf4kernels as nf4
from nf4kernels.recover import fit_codebook, shared_codebook


def error(weights, codebook, importance=None):
    total = 0.0
    for i, weight in enumerate(weights):
        left = (nf4.dequantize(nf4.quantize(weight, codebook, double_quant=False), torch.float32) - weight).square()
        total += (left if importance is None else left * importance[i]).sum().item()
    return total


def test_weights_on_16_levels_give_these_levels():
    levels = torch.tensor([-1, -0.8, -0.6, -0.45, -0.35, -0.25, -0.15, -0.05, 0.02, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])
    drawn = levels[torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(0))]
    drawn[:, 0] = 1  # each block's scale is its row's factor
    weight = drawn * torch.logspace(-2, 2, 64)[:, None]
    assert torch.allclose(fit_codebook([weight]), levels, atol=1e-5)


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform"])
def test_never_worse_than_nf4(draw):
    torch.manual_seed(0)
    noise = {"normal": torch.randn, "uniform": lambda *s: 2 * torch.rand(*s) - 1}.get(
        draw, lambda *s: torch.distributions.Laplace(0.0, 1.0).sample(s)
    )
    weights = [noise(64, 128), 0.01 * noise(32, 96)]
    levels = fit_codebook(weights)
    assert levels.shape == (16,)
    assert levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert levels.abs().max() <= 1
    assert error(weights, levels) < 0.97 * error(weights, "nf4")
    assert error(weights, fit_codebook(weights, iterations=5)) >= error(weights, levels) * (1 - 1e-6)


def test_importance_moves_levels_to_what_counts():
    torch.manual_seed(0)
    weights = [torch.cat([torch.randn(64, 64), 2 * torch.rand(64, 64) - 1], 1)]
    importance = [torch.cat([torch.full((64,), 1e-3), torch.ones(64)])]
    weighted, plain = fit_codebook(weights, importance), fit_codebook(weights)
    assert error(weights, weighted, importance) < error(weights, plain, importance)
    assert error(weights, weighted) > error(weights, plain)
    assert torch.equal(fit_codebook(weights, [torch.ones(128)]), plain)


def test_a_whole_model_on_its_own_codebook():
    model = ByteLM()  # uniform weights
    layers = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    codebook = shared_codebook(model)
    assert torch.equal(codebook, fit_codebook(layers))
    report = nf4.quantize_model(model, progress=False, codebook=codebook)
    plain = nf4.quantize_model(ByteLM(), progress=False)
    assert report.rms_error < 0.9 * plain.rms_error
    assert report.bytes_after == plain.bytes_after
    assert model.layers[0].q_proj.codebook == "custom"


def test_what_is_refused():
    with pytest.raises(ValueError, match="weights must hold a weight other than zero, got none"):
        fit_codebook([torch.zeros(4, 64)])
    with pytest.raises(ValueError, match="importance must have one for each weight, got fewer"):
        fit_codebook([torch.ones(4, 64)] * 2, [torch.ones(64)])
    with pytest.raises(ValueError, match="block_size must be"):
        fit_codebook([torch.ones(4, 64)], block_size=10)
