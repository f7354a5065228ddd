"""Activations at the values of 8-bit integers: against arithmetic done by hand, and what they cost a model."""

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn

import nf4kernels as nf4
from nf4kernels.recover import activation_costs, activation_ranges, agreement, prepare_qat, quantized_activations
from nf4kernels.recover.activations import fake_quantize_activations


def ids(rows=2, length=24, seed=0):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


class Masked(nn.Module):
    """A layer on rows of which a mask says which count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, attention_mask):
        return self.layer(input=x)


def bounds(low, high):
    return torch.tensor(float(low)), torch.tensor(float(high))


def test_symmetric_values():
    x = torch.tensor([-127.0, -0.6, 0.0, 0.4, 0.6, 99.5001, 127.0, 300.0, -300.0])
    got = fake_quantize_activations(x, *bounds(-127, 60))
    assert got.tolist() == [-127, -1, 0, 0, 1, 100, 127, 127, -127]


def test_asymmetric_values_zero_and_clipping():
    x = torch.tensor([-1.0, -0.26, 0.0, 0.24, 0.26, 126.5, 1000.0, -1000.0])
    got = fake_quantize_activations(x, *bounds(-1, 126.5), symmetric=False)  # scale 1/2, zero point 2
    assert got.tolist() == [-1, -0.5, 0, 0, 0.5, 126.5, 126.5, -1]


@pytest.mark.parametrize(("low", "high"), [(-3.7, 11.3), (0.3, 9.1), (-8.2, -0.1), (-1e-20, 3), (0, 0), (2, 2)])
def test_zero_is_exact_and_half_a_step_the_error(low, high):
    x = torch.linspace(low, high, 1001)
    x[500] = 0
    got = fake_quantize_activations(x, *bounds(low, high), symmetric=False)
    assert got[500] == 0
    step = (max(high, 0) - min(low, 0)) / 255
    assert (got - x).abs().max() <= step * (1 + 1e-4), "half for the value, half for the zero point at the ends"
    assert len(got.unique()) <= 256
    symmetric = fake_quantize_activations(x, *bounds(low, high))
    assert (symmetric - x).abs().max() <= max(abs(low), abs(high)) / 127 * 0.5001
    assert symmetric[500] == 0


def test_more_bits_less_error_and_the_dtype_stays():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    low, high = x.aminmax()
    errors = [(fake_quantize_activations(x, low, high, bits) - x).square().mean().item() for bits in (4, 6, 8)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert fake_quantize_activations(x.bfloat16(), low, high).dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["token", "tensor"])
def test_the_layer_gets_rounded_rows(per, symmetric):
    model = nn.Sequential(nn.Linear(16, 4))
    x = torch.randn(3, 16) * torch.tensor([[1.0], [10.0], [0.1]])
    low, high = x.aminmax(dim=1, keepdim=True) if per == "token" else x.aminmax()
    expected = model(fake_quantize_activations(x, low, high, 8, symmetric))
    plain = model(x)
    with quantized_activations(model, per=per, symmetric=symmetric) as names:
        assert names == ["0"]
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), plain)


def test_static_ranges_clip_what_is_outside_them():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight.data = torch.eye(4)
    x = torch.tensor([[-9.0, 0.5, 127.0, 500.0]])
    with quantized_activations(model, mode="static", ranges={"0": (-127.0, 127.0)}):
        assert model(x).tolist() == [[-9, 0, 127, 127]]
    with quantized_activations(model, mode="static", symmetric=False, ranges={"0": (-5.0, 250.0)}):
        assert model(x).tolist() == [[-5, 0, 127, 250]]


def test_ranges_are_the_extremes_or_the_percentiles():
    model = nn.Sequential(nn.Linear(100, 2))
    batches = [torch.arange(100.0)[None], torch.arange(100.0)[None] - 60]
    assert activation_ranges(model, batches) == {"0": (-60.0, 99.0)}
    low, high = activation_ranges(model, batches, percentile=98)["0"]
    assert (low, high) == (((0 + 2) + (-60 + 2)) / 2, ((99 - 2) + (39 - 2)) / 2)
    assert model.training


def test_padding_sets_no_range():
    whole = torch.arange(12.0).view(1, 3, 4)
    batch = {"x": torch.cat([whole, torch.full((1, 2, 4), 1e3)], 1), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    assert activation_ranges(Masked(), [batch]) == {"layer": (0.0, 11.0)}


def test_the_layers_of_each_kind_and_skip():
    for make in (lambda m: None, lambda m: nf4.quantize_model(m, progress=False), lambda m: prepare_qat(m)):
        model = ByteLM()
        make(model)
        with quantized_activations(model, skip=["layers.1", "v_proj"]) as names:
            assert names == [f"layers.0.{n}_proj" for n in ("q", "k", "o", "gate", "up", "down")]


def test_hooks_are_gone_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError), quantized_activations(model):
        model(torch.ones(1, 5))
    assert not model[0]._forward_pre_hooks


def test_costs_in_a_table_and_a_model_beside_itself():
    model, batches = ByteLM(), [ids(), ids(seed=1)]
    found = activation_costs(model, model, batches, [ids(seed=2)])
    assert list(found)[:3] == ["16 bits", "dynamic, per token, symmetric", "dynamic, per token, asymmetric"]
    assert len(found) == 9
    assert "static, asymmetric, 99.9 %" in found
    assert found["16 bits"].kl == 0
    assert all(0 < each.kl < 0.01 for name, each in found.items() if name != "16 bits")
    by_hand = agreement(model, model, batches)
    assert found["16 bits"] == by_hand
    coarse = activation_costs(model, model, batches, [ids(seed=2)], bits=4, percentile=None)
    assert len(coarse) == 7
    assert coarse["static, symmetric"].kl > found["static, symmetric"].kl
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    for options, said in (
        ({"mode": "fixed"}, "mode must be one of"),
        ({"bits": 9}, "bits must be from 2 to 8, got 9"),
        ({"per": "row"}, "per must be one of"),
        ({"mode": "static", "per": "token", "ranges": {"0": (0, 1)}}, "per must be tensor, got 'token'"),
        ({"mode": "static"}, "ranges must come with mode='static'"),
        ({"ranges": {"0": (0, 1)}}, "ranges must come with mode='static', and with it alone"),
        ({"mode": "static", "ranges": {}}, "ranges must have every layer, got none for 0"),
    ):
        with pytest.raises(ValueError, match=said), quantized_activations(model, **options):
            pass
    with pytest.raises(ValueError, match="percentile must be above 50 and up to 100, got 30"):
        activation_ranges(model, [], percentile=30)
    with pytest.raises(ValueError, match="batches must reach every layer, got no input of 0"):
        activation_ranges(model, [])
