"""GPTQ with a codebook, and coordinate descent: closed forms, and the error on the calibration data."""

from itertools import product as every

import pytest
import torch
from torch import nn

import nf4kernels as nf4
from nf4kernels.recover.roundings import Awq, Gptq, ScaleSearch
from nf4kernels.recover.roundings.encoding import codes_of, decoded_scales, nearest_codes, scale_of_each
from nf4kernels.recover.roundings.gptq import damped, gptq, inverse_factor, swept
from nf4kernels.recover.roundings.scales import refitted_scales


def inputs(K: int, correlated: bool, rows: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(rows, K, generator=generator)
    if correlated:
        x = x @ torch.randn(K, K, generator=generator) * torch.linspace(0.1, 3, K) + 0.5
    return x


def layer(N: int, K: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(N * K)
        return nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", [(5, 128), (9, 100), (3, 77)])
def test_an_identity_hessian_is_plain_rounding_bit_for_bit(shape, act_order):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    hessian = 3 * torch.eye(shape[1])
    plain = nf4.quantize(weight, double_quant=False)
    found = gptq(weight, plain, hessian, act_order=act_order)
    assert torch.equal(found.packed, plain.packed)
    assert torch.equal(found.absmax, plain.absmax)
    double = nf4.quantize(weight)
    scales = scale_of_each(decoded_scales(double), shape, 64)
    nearest = nearest_codes(weight.float(), scales, double.code)
    assert torch.equal(codes_of(gptq(weight, double, hessian, act_order=act_order)), nearest)


def test_two_columns_in_closed_form():
    weight = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    hessian = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    qweight = nf4.quantize(weight, block_size=16, double_quant=False)
    H = damped(hessian, 0.01)
    scales = scale_of_each(decoded_scales(qweight), (200, 2), 16)
    first = nearest_codes(weight[:, 0], scales[:, 0], qweight.code)
    left = weight[:, 0] - qweight.code[first.long()] * scales[:, 0]
    second = nearest_codes(weight[:, 1] + left * H[0, 1] / H[1, 1], scales[:, 1], qweight.code)
    assert torch.equal(codes_of(gptq(weight, qweight, hessian)), torch.stack([first, second], 1))
    assert not torch.equal(second, nearest_codes(weight[:, 1], scales[:, 1], qweight.code))


def test_the_inverse_factor():
    x = inputs(40, True)
    H = (x.T @ x) / len(x)
    U = inverse_factor(H, 0.1).double()
    torch.testing.assert_close(U.T @ U @ damped(H, 0.1).double(), torch.eye(40, dtype=torch.float64), atol=1e-3, rtol=0)
    assert torch.equal(U, U.triu())
    assert inverse_factor(torch.zeros(3, 3), 0.01).isfinite().all()  # inputs that are always 0
    with pytest.raises(ValueError, match="hessian must be positive definite once damped"):
        inverse_factor(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01)


def test_coordinate_descent_ends_where_no_single_code_is_better():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    x = inputs(16, True)
    H = (x.T @ x) / len(x)
    qweight = nf4.quantize(weight, block_size=16, double_quant=False)
    error = weight - nf4.dequantize(qweight, torch.float32)
    product = error @ H

    def cost(left):
        return ((left @ H) * left).sum(1, dtype=torch.float64)

    costs = [cost(error)]
    for _ in range(40):
        qweight = swept(weight, qweight, error, product, H)
        costs.append(cost(error))
        assert (costs[-1] <= costs[-2] * (1 + 1e-5)).all()
    torch.testing.assert_close(error, weight - nf4.dequantize(qweight, torch.float32), atol=1e-5, rtol=0)
    torch.testing.assert_close(product, error @ H, atol=1e-3 * float(H.max()), rtol=0)
    scales = decoded_scales(qweight)[:, None]
    for column, level in every(range(16), qweight.code):
        other = error.clone()
        other[:, column] = weight[:, column] - level * scales[:, 0]
        assert (cost(other) >= costs[-1] * (1 - 1e-4)).all()


@pytest.mark.parametrize("double_quant", [False, True])
def test_refitted_scales_lower_the_error_and_keep_the_codes(double_quant):
    weight = torch.randn(12, 256, generator=torch.Generator().manual_seed(0))
    x = inputs(256, True, 600)
    H = (x.T @ x) / len(x)
    qweight = nf4.quantize(weight, double_quant=double_quant)
    error = weight - nf4.dequantize(qweight, torch.float32)
    before = ((error @ H) * error).sum()
    product = error @ H
    found = refitted_scales(error, product, H, qweight)
    left = weight - nf4.dequantize(found, torch.float32)
    assert torch.equal(found.packed, qweight.packed)
    torch.testing.assert_close(error, left, atol=1e-5, rtol=0)
    assert ((left @ H) * left).sum() < before
    if not double_quant:  # the last block of a row is at its minimum: the derivative by its scale is 0
        levels = found.code[codes_of(found).long()][:, -64:]
        slope = ((left @ H)[:, -64:] * levels).sum(1)
        torch.testing.assert_close(slope, torch.zeros(12), atol=2e-3 * float(H.diagonal().mean()), rtol=0)


ROUNDINGS = {
    "search": lambda x: ScaleSearch(x),
    "kmeans": lambda x: ScaleSearch(x, levels="kmeans"),
    "gptq": lambda x: Gptq(x),
    "in order": lambda x: Gptq(x, act_order=False),
    "gptq search kmeans": lambda x: Gptq(x, scales="search", levels="kmeans", sweeps=2),
    "gptq sweeps": lambda x: Gptq(x, sweeps=1),
    "awq": lambda x: Awq(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(48, 128), (30, 100)])
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_error_on_the_calibration_data_is_not_above_plain_rounding(rounding, correlated, N, K, dtype):
    x = inputs(K, correlated).to(dtype)
    dense, plain, model = layer(N, K, True, dtype), layer(N, K, True, dtype), layer(N, K, True, dtype)
    nf4.quantize_model(plain, progress=False)
    nf4.quantize_model(model, progress=False, rounding=ROUNDINGS[rounding]([x]))

    def error(of):
        left = (of[0].dequantize(torch.float32) - dense[0].weight.float()) @ x.float().T
        return left.square().sum(dtype=torch.float64)

    assert error(model) <= error(plain) * (1 + 1e-6)
    if "gptq" in rounding and correlated:
        assert error(model) < 0.7 * error(plain)
    assert model[0].bias is dense[0].bias or torch.equal(model[0].bias, dense[0].bias)


def test_bias_correction_takes_the_mean_error_away():
    x = inputs(96, True)
    dense, model = layer(20, 96, True), layer(20, 96, True)
    nf4.quantize_model(model, progress=False, rounding=ScaleSearch([x], scales="absmax", correct_bias=True))
    with torch.no_grad():
        left = (model(x) - dense(x)).mean(0)
        without = ((model[0].dequantize(torch.float32) - dense[0].weight) @ x.T).mean(1)
    assert left.norm() < 1e-3 * without.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gptq([]), "Gptq: batches must hold at least one batch"),
        (lambda: Gptq([1], scales="max"), "Gptq: scales must be one of absmax, search, got 'max'"),
        (lambda: Gptq([1], levels="x"), "levels must be one of given, kmeans"),
        (lambda: Gptq([1], damping=0), "damping must be above 0"),
        (lambda: Gptq([1], sweeps=-1), "sweeps must be at least 0"),
        (lambda: ScaleSearch(correct_bias=True), "correct_bias must go with batches"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gptq_needs_batches():
    with pytest.raises(RuntimeError, match="Gptq: batches must be given, got None"):
        nf4.quantize_model(layer(8, 64), progress=False, rounding=Gptq())


def test_k_means_is_refused_where_the_format_has_its_own_levels():
    with pytest.raises(RuntimeError, match="levels must be 'given' with codebook='mxfp4', got 'kmeans'"):
        nf4.quantize_model(
            layer(8, 64), progress=False, codebook="mxfp4", rounding=ScaleSearch([inputs(64, False)], levels="kmeans")
        )


@pytest.mark.parametrize(
    "options", [{"codebook": "mxfp4"}, {"codebook": "nvfp4"}, {"codebook": "int4_symmetric"}, {"codebook": "fp4"}]
)
def test_other_formats_are_rounded_too(options):
    x = inputs(128, True)
    dense, plain, model = layer(16, 128), layer(16, 128), layer(16, 128)
    nf4.quantize_model(plain, progress=False, **options)
    nf4.quantize_model(model, progress=False, rounding=Gptq([x], scales="search", sweeps=1), **options)
    errors = [((of[0].dequantize(torch.float32) - dense[0].weight) @ x.T).norm() for of in (model, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert model[0].codebook == options["codebook"]
