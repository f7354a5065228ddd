"""Low rank by SVD: exact at full rank, else the tail of the singular values; budgets in bytes."""

import math

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn

import nf4kernels as nf4
from nf4kernels.recover import agreement, low_rank_linear, low_rank_model
from nf4kernels.recover.low_rank import input_grams


def ids(rows=4, length=32, seed=0):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def linear(N, K, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias, dtype=dtype)


def product(parts):
    return (parts[1].weight @ parts[0].weight).detach()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_full_rank_is_exact(shape):
    layer, x = linear(*shape), torch.randn(5, shape[1], dtype=torch.float64)
    X = torch.randn(40, shape[1], dtype=torch.float64)
    for gram in (None, X.T @ X):
        parts = low_rank_linear(layer, 12, gram)
        assert [tuple(part.weight.shape) for part in parts] == [(12, shape[1]), (shape[0], 12)]
        assert torch.allclose(parts(x), layer(x), atol=1e-10)
        assert parts[0].bias is None
        assert parts[1].bias is layer.bias


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_error_is_the_tail_of_the_singular_values(rank):
    layer = linear(12, 20)
    W, S = layer.weight.detach(), torch.linalg.svdvals(layer.weight)
    left = W - product(low_rank_linear(layer, rank))
    assert left.norm().item() == pytest.approx(S[rank:].norm().item(), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_weighted_error_is_the_tail_after_whitening(rank):
    layer = linear(12, 20)
    X = torch.randn(64, 20, dtype=torch.float64) * torch.logspace(-1, 1, 20, dtype=torch.float64)
    W, gram = layer.weight.detach(), X.T @ X
    S = torch.linalg.svdvals(W @ torch.linalg.cholesky(gram))
    left, plain = (W - product(low_rank_linear(layer, rank, each)) for each in (gram, None))
    assert (X @ left.T).norm().item() == pytest.approx(S[rank:].norm().item(), rel=1e-4)
    assert (X @ left.T).norm() < (X @ plain.T).norm()


def test_inputs_that_never_moved():
    layer, X = linear(12, 20), torch.zeros(64, 20, dtype=torch.float64)
    X[:, :6] = torch.randn(64, 6)
    parts = low_rank_linear(layer, 6, X.T @ X)
    assert product(parts).isfinite().all()
    assert torch.allclose(X @ product(parts).T, X @ layer.weight.T, atol=1e-2)


def test_ranks_of_a_share_and_what_would_not_shrink():
    model = ByteLM()  # 64 x 64 and 64 x 128
    before = sum(p.numel() for p in model.parameters())
    made = low_rank_model(model, share=0.5, progress=False)
    assert {layer.rank for layer in made} == {16, 21}
    assert len(made) == 14
    assert type(model.layers[0].q_proj) is nn.Sequential
    assert tuple(made[0].shape) == (64, 64)
    assert before - sum(p.numel() for p in model.parameters()) == 2 * (4 * 64 * 32 + 3 * (64 * 128 - 21 * 192))
    whole = ByteLM()
    assert low_rank_model(whole, rank=32, layers=["q_proj"], progress=False) == []
    assert type(whole.layers[0].q_proj) is nn.Linear


def test_a_budget_is_kept_and_goes_where_the_singular_values_are():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    flat, steep = torch.linalg.qr(torch.randn(64, 64)).Q, torch.randn(64, 4) @ torch.randn(4, 64)
    model[0].weight.data, model[1].weight.data = flat, steep
    budget = 4 * 128 * (4 + 12)
    made = low_rank_model(model, budget=budget, progress=False)
    assert [layer.rank for layer in made] == [12, 4]
    assert sum(p.nbytes for p in model.parameters()) == budget
    assert made[0].error == pytest.approx(math.sqrt(52 / 64), rel=1e-4)
    assert made[1].error < 1e-5
    assert low_rank_model(ByteLM(), budget=1 << 30, progress=False) == []


def test_calibration_lowers_the_error_on_the_inputs_and_the_modes_stay():
    reference, batches = ByteLM(), [ids(), ids(seed=1)]
    errors = []
    for calibration in (None, batches):
        model = ByteLM()
        made = low_rank_model(model, share=0.4, batches=calibration, progress=False)
        errors.append(agreement(model, reference, batches).kl)
        assert model.training
        assert all(0 < layer.error < 1 for layer in made)
    assert errors[1] < errors[0]


def test_grams_are_the_sums_over_batches():
    model, batches = nn.Sequential(nn.Linear(6, 3)), [torch.randn(4, 5, 6), torch.randn(2, 6)]
    X = torch.cat([batch.reshape(-1, 6) for batch in batches])
    assert torch.allclose(input_grams(model, ["0"], batches)["0"], X.T @ X, atol=1e-5)
    with pytest.raises(ValueError, match="batches must give layers finite inputs, got NaN or inf at 0"):
        input_grams(model, ["0"], [torch.full((2, 6), torch.inf)])
    with pytest.raises(ValueError, match="gram must be finite"):
        low_rank_linear(model[0], 2, torch.full((6, 6), torch.nan))


def test_the_parts_are_quantized():
    model = ByteLM()
    low_rank_model(model, ["layers.0"], share=0.5, progress=False)
    report = nf4.quantize_model(model, progress=False)
    assert {"layers.0.q_proj.0", "layers.0.q_proj.1", "layers.1.q_proj"} < {layer.name for layer in report.layers}
    assert model(ids())["logits"].isfinite().all()


def test_what_is_refused_leaves_the_model():
    model = ByteLM()
    before = dict(model.named_modules())
    for options, said in (
        ({}, "one of rank, share and budget must be given"),
        ({"rank": 4, "share": 0.5}, "one of rank, share and budget must be given, got 4, 0.5, None"),
        ({"share": 1.0}, "share must be below 1, got 1.0"),
        ({"rank": 0}, "rank must be above 0, got 0"),
        ({"budget": 100}, "budget must be 8704 bytes or more, rank 1 of every layer, got 100"),
        ({"rank": 4, "layers": ["embed"]}, "layers must name layers that quantize_model would take, got 'embed'"),
        ({"rank": 4, "batches": []}, "batches must reach every layer, got no input of layers.0.q_proj"),
    ):
        with pytest.raises(ValueError, match=said):
            low_rank_model(model, progress=False, **options)
    with pytest.raises(ValueError, match="rank must be from 1 to 12, got 13"):
        low_rank_linear(linear(12, 20), 13)
    with pytest.raises(ValueError, match=r"gram must have shape \[20, 20\], got \[12, 12\]"):
        low_rank_linear(linear(12, 20), 3, torch.eye(12))
    assert dict(model.named_modules()) == before
