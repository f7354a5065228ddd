"""PiSSA and LoftQ: adapters that start from the dense weight, and what is saved of them."""

import copy

import pytest
import torch
from support.adapted_model import CONFIG, WEIGHTS, Net
from torch import nn

import nf4kernels as nf4
from nf4kernels import LoraConfig, QuantLinear
from nf4kernels.nn.lora import principal_components

STARTS = ("pissa", "loftq")


def heavy_tailed(N=160, K=192, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    normal, chi = torch.randn(N, K, generator=generator), torch.randn(3, N, K, generator=generator).square().sum(0)
    return (normal / (chi / 3).sqrt() / K**0.5).to(dtype)  # Student's t with three degrees of freedom


def linear(weight, bias=True):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def with_adapter(layer):
    return layer.dequantize(torch.float32) + layer.lora_delta()


@pytest.mark.parametrize("r", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", STARTS)
def test_it_begins_closer_to_the_weight_than_4_bits_alone(init, dtype, r):
    W = heavy_tailed(dtype=dtype)
    plain = (nf4.dequantize(nf4.quantize(W), torch.float32) - W.float()).norm()
    dense = linear(W)
    layer = QuantLinear.from_linear(dense, lora=LoraConfig(r=r, init=init))
    assert layer.lora_A.weight.dtype == layer.dense_dtype == dtype
    error = (with_adapter(layer) - W.float()).norm()
    # A rank r of K takes at least about its share of the squared error of white noise, more of what has large parts.
    assert error < plain * (1 - r / 192) ** 0.5
    x = torch.randn(5, 192, dtype=dtype)
    off, off_plain = ((each(x) - dense(x)).norm() for each in (layer, QuantLinear.from_linear(dense)))
    assert off < off_plain


def test_the_principal_components_are_nearly_the_best():
    W = heavy_tailed()
    U, S, Vh = torch.linalg.svd(W)
    for r in (4, 16):
        best = (W - U[:, :r] * S[:r] @ Vh[:r]).norm()
        u, s, vh = principal_components(W, r)
        assert u.shape == (160, r)
        assert (W - u * s @ vh).norm() <= 1.002 * best
        torch.testing.assert_close(vh @ vh.T, torch.eye(r), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", STARTS)
def test_it_is_the_same_every_time(init):
    layers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layers.append(QuantLinear.from_linear(linear(heavy_tailed(), bias=False), lora=LoraConfig(init=init)))
    first, second = (layer.state_dict() for layer in layers)
    assert {"lora_A.start", "lora_B.start"} <= set(first)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_options_of_both_kinds(init, rslora):
    config = LoraConfig(r=8, alpha=3, use_rslora=rslora, init=init)
    layer = QuantLinear.from_linear(linear(heavy_tailed()), config, codebook="fp4", block_size=32, double_quant=False)
    assert (layer.codebook, layer.block_size, layer.double_quant) == ("fp4", 32, False)
    plain = QuantLinear.from_linear(linear(heavy_tailed()), codebook="fp4", block_size=32, double_quant=False)
    assert (with_adapter(layer) - heavy_tailed()).norm() < (plain.dequantize(torch.float32) - heavy_tailed()).norm()


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (1, 1), (0, 64), (5, 0)])
def test_a_rank_above_the_weight_s(init, shape):
    W = heavy_tailed(*shape)
    layer = QuantLinear.from_linear(linear(W), lora=LoraConfig(r=16, init=init))
    torch.testing.assert_close(with_adapter(layer), W, rtol=1e-4, atol=1e-5)
    layer(torch.randn(3, shape[1])).sum().backward()
    assert layer.lora_B.weight.grad.isfinite().all()


@pytest.mark.parametrize("init", STARTS)
def test_where_the_dense_weight_is_gone_it_is_refused(init):
    layer = QuantLinear(64, 32)
    with pytest.raises(ValueError, match=f"add_lora: init must be 'default' or 'gaussian' .*got '{init}'"):
        layer.add_lora(LoraConfig(init=init))
    assert layer.adapter_names == []
    with pytest.raises(ValueError, match="alpha must be above 0"):
        LoraConfig(alpha=0, init=init)


@pytest.mark.parametrize("init", STARTS)
def test_new_weights_are_started_from_anew(init):
    layer = QuantLinear(64, 32, lora=LoraConfig(r=4, init=init), dtype=torch.float32)
    assert layer.lora_B.weight.count_nonzero()
    before = layer.lora_B.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.lora_B.weight, before)
    assert torch.equal(layer.lora_B.weight, layer.lora_B.start)


@pytest.mark.parametrize("init", STARTS)
def test_a_model_s_report_measures_it(init):
    plain, started = Net(), Net()
    started.load_state_dict(plain.state_dict())
    without = nf4.quantize_model(plain, progress=False)
    with_start = nf4.quantize_model(started, lora=LoraConfig(r=4, init=init), progress=False)
    for a, b in zip(without.layers, with_start.layers):
        assert a.name == b.name
        assert b.rms_error < a.rms_error
    layer = started.blocks[0].up_proj
    error = (with_adapter(layer) - plain.blocks[0].up_proj.dequantize(torch.float32)).norm()
    assert error > 0


def started_model(init, use_rslora=False):
    """(dense model, the same quantized with an adapter that has been trained a little)."""
    torch.manual_seed(3)
    dense = Net().requires_grad_(False)
    model = copy.deepcopy(dense)
    nf4.quantize_model(
        model, skip=["lm_head"], lora=LoraConfig(r=4, alpha=6, use_rslora=use_rslora, init=init), progress=False
    )
    return dense, model


def train(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))


def change(layer):
    start = layer.lora.scaling * layer.lora_B.start @ layer.lora_A.start
    return (layer.lora_delta() - start).detach()


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_is_the_change_over_the_original_weight(tmp_path, init, rslora):
    dense, model = started_model(init, rslora)
    nf4.save_adapters(model, tmp_path / "fresh")
    fresh = copy.deepcopy(dense)
    nf4.quantize_model(fresh, skip=["lm_head"], progress=False)
    x = torch.randn(4, 32)
    base = fresh(x)
    nf4.load_adapters(fresh, tmp_path / "fresh")
    torch.testing.assert_close(fresh(x), base, rtol=1e-4, atol=1e-5)

    train(model)
    nf4.save_adapters(model, tmp_path)
    nf4.load_adapters(fresh, tmp_path)
    for mine, theirs in zip(model.blocks, fresh.blocks):
        assert theirs.q_proj.lora.r == 8
        assert theirs.q_proj.lora.init == "default"
        torch.testing.assert_close(theirs.q_proj.lora_delta(), change(mine.q_proj), rtol=1e-4, atol=1e-6)
    assert (tmp_path / CONFIG).exists()
    assert (tmp_path / WEIGHTS).exists()
    with pytest.raises(ValueError, match=f"quantized without an adapter that started .*init='{init}'"):
        nf4.load_adapters(model, tmp_path)


@pytest.mark.parametrize("init", STARTS)
def test_merged_into_either_weight(init):
    dense, model = started_model(init)
    train(model)
    x = torch.randn(4, 32)
    expected = model(x)
    layer = model.blocks[1].up_proj
    wanted = dense.blocks[1].up_proj.weight + change(layer)
    into_base = copy.deepcopy(model)
    nf4.merge_model(into_base, base=dense)
    torch.testing.assert_close(into_base.blocks[1].up_proj.weight, wanted, rtol=1e-4, atol=1e-6)
    nf4.merge_model(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", STARTS)
def test_checkpoints_and_copies_know_where_it_started(tmp_path, init):
    dense, model = started_model(init)
    train(model)
    nf4.save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = copy.deepcopy(dense)
    nf4.load_checkpoint(loaded, tmp_path / "model.safetensors")
    x = torch.randn(4, 32)
    for each in (loaded, copy.deepcopy(model)):
        assert torch.equal(each(x), model(x))
        assert each.blocks[0].q_proj.lora.init == init
        assert torch.equal(change(each.blocks[0].q_proj), change(model.blocks[0].q_proj))
    assert loaded.to(torch.bfloat16).blocks[0].q_proj.lora_A.start.dtype == torch.bfloat16


@pytest.mark.parametrize("init", STARTS)
def test_new_weights_start_an_adapter_that_waits_anew_too(init):
    layer = QuantLinear(64, 32, lora=LoraConfig(r=4, init=init), dtype=torch.float32)
    layer.add_lora(LoraConfig(r=4), name="other")
    layer.set_adapter("other")
    layer.reset_parameters()
    layer.set_adapter("default")
    assert not layer.lora_delta().any()
    assert not layer.delta_over_original().any()
