"""LQ-LoRA: the weighted factors against whole singular value decompositions, and the adapter as any other."""

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn
from torch.nn import functional

import nf4kernels as nf4
from nf4kernels.model.targets import Target
from nf4kernels.nn.lora import principal_factors
from nf4kernels.recover import agreement
from nf4kernels.recover.roundings import Gptq, LqLora
from nf4kernels.recover.roundings.lq_lora import DAMPING, squared_gradients, weighted_error, weighted_factors

LORA = nf4.LoraConfig(r=4, alpha=8)


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def uneven_lm() -> ByteLM:
    """Some channels behind a norm are much larger than others."""
    model, generator = ByteLM(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.copy_(torch.randn(64, generator=generator).exp())
    return model


def weights_of(kind: str, N: int, K: int):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, K, generator=generator) @ torch.randn(K, K, generator=generator)
    if kind == "hessian":
        return None, x.T @ x / 300
    return torch.rand(N, generator=generator) + 0.1 if kind == "fisher" else None, x.square().mean(0)


@pytest.mark.parametrize("kind", ["hessian", "activation", "fisher"])
def test_the_factors_are_the_best_of_their_rank(kind):
    error = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    rows, columns = weights_of(kind, 40, 30)
    A, B = weighted_factors(error, rows, columns, LORA, torch.float32)
    left = weighted_error(error - LORA.scaling * B @ A, rows, columns)
    C = torch.linalg.cholesky(columns.double()) if columns.dim() == 2 else columns.double().sqrt().diag()
    scaled = error.double() @ C if rows is None else rows.double().sqrt()[:, None] * error.double() @ C
    best = torch.linalg.svdvals(scaled)[4:].square().sum().item()
    assert left == pytest.approx(best, rel=2e-3)
    plain_A, plain_B = principal_factors(error, LORA, torch.float32)
    assert left < 0.99 * weighted_error(error - LORA.scaling * plain_B @ plain_A, rows, columns)


def test_one_iteration_with_equal_weights_is_the_svd_of_the_error():
    dense = nn.Linear(64, 48, bias=False)
    model = nn.Sequential(dense)
    x = torch.linalg.qr(torch.randn(64, 64)).Q * 8  # its second moments are the identity's
    nf4.quantize_model(model, progress=False, lora=LORA, rounding=LqLora([x], iterations=1))
    left = dense.weight.detach() - model[0].dequantize(torch.float32)
    U, S, Vh = torch.linalg.svd(left)
    expected = U[:, :4] * S[:4] @ Vh[:4]
    assert (model[0].lora_delta() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("weighting", ["hessian", "activation", "fisher"])
def test_it_is_closer_than_loftq_which_has_no_weights(weighting):
    reference, batches, held_out = uneven_lm(), [text(8, 32), text(8, 32, 1)], [text(8, 32, 9)]
    loftq, ours, composed = uneven_lm(), uneven_lm(), uneven_lm()
    nf4.quantize_model(loftq, progress=False, lora=nf4.LoraConfig(r=4, alpha=8, init="loftq"))
    nf4.quantize_model(ours, progress=False, lora=LORA, rounding=LqLora(batches, weighting))
    nf4.quantize_model(composed, progress=False, lora=LORA, rounding=LqLora(batches, weighting, then=Gptq()))
    found = [agreement(model, reference, held_out).kl for model in (composed, ours, loftq)]
    assert found == sorted(found)
    assert ours.layers[0].q_proj.lora.init == "loftq"


def test_columns_that_no_row_reaches_take_no_rank():
    torch.manual_seed(0)
    x = torch.randn(256, 64) / 10
    x[:, 32:] = 0
    dense = nn.Linear(64, 48, bias=False)
    model = nn.Sequential(dense)
    nf4.quantize_model(model, progress=False, lora=LORA, rounding=LqLora([x]))
    layer = model[0]
    error = dense.weight.detach() - layer.dequantize(torch.float32)
    left = error - LORA.scaling * layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
    best = torch.linalg.svdvals(error.double() @ x.T.double())[4:].norm().item()
    assert (left @ x.T).norm().item() < 1.05 * best


def test_its_adapters_are_written_over_the_original_weight(tmp_path):
    model, dense = ByteLM(), ByteLM()
    nf4.quantize_model(model, progress=False, lora=LORA, rounding=LqLora([text(4, 20)]))
    with torch.no_grad():
        model.layers[0].q_proj.lora_B.weight.add_(0.01)
    change = model.layers[0].q_proj.delta_over_original()
    nf4.save_adapters(model, tmp_path)
    plain = ByteLM()
    nf4.quantize_model(plain, progress=False)
    nf4.load_adapters(plain, tmp_path)
    torch.testing.assert_close(plain.layers[0].q_proj.lora_delta(), change, atol=1e-4, rtol=1e-3)
    assert change.norm() < dense.layers[0].q_proj.weight.norm()
    nf4.save_checkpoint(model, tmp_path / "model.safetensors")
    other = ByteLM(seed=1)
    nf4.quantize_model(other, progress=False, lora=LORA, rounding=LqLora([text(4, 20)]))
    nf4.load_checkpoint(other, tmp_path / "model.safetensors")
    assert torch.equal(other(text(1, 9))["logits"], model(text(1, 9))["logits"])


def test_squared_gradients_against_autograd():
    model, batches = ByteLM(), [text(2, 12), text(3, 9, 1)]
    model.norm.weight.grad = torch.ones(64)
    model.embed.weight.requires_grad_(False)
    found = squared_gradients(model, [Target(["layers.1.up_proj"], None, {})], batches)
    assert torch.equal(model.norm.weight.grad, torch.ones(64))
    assert model.layers[1].up_proj.weight.grad is None
    assert model.norm.weight.requires_grad
    assert not model.embed.weight.requires_grad
    total = torch.zeros(128, 64)
    for ids in batches:
        logits = model(ids)["logits"][:, :-1].reshape(-1, 64)
        loss = functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
        total += torch.autograd.grad(loss, model.layers[1].up_proj.weight)[0].square()
    rows, columns = found["layers.1.up_proj"]
    for ours, axis in ((rows, 1), (columns, 0)):
        expected = total.mean(axis)
        torch.testing.assert_close(ours, (expected / expected.mean()).clamp(min=DAMPING), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LqLora([1], "svd"), ValueError, "weighting must be one of hessian, activation, fisher, got 'svd'"),
        (lambda: LqLora([1], iterations=0), ValueError, "iterations must be at least 1"),
        (
            lambda: nf4.quantize_model(ByteLM(), progress=False, rounding=LqLora([text(1, 5)])),
            RuntimeError,
            r"lora must be given for every layer, got None for layers\.0\.q_proj",
        ),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
