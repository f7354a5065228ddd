"""from_bnb and to_bnb: layers, models, quant states and state dicts, bit for bit, both ways."""

import dataclasses

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn

import nf4kernels as nf4
from nf4kernels.integrations.bitsandbytes import from_bnb, to_bnb

SIZES = ((64, 128), (50, 96), (5, 33), (3, 10))  # N, K


def linear4bit(N, K, bias=True, **options):
    layer = bnb.nn.Linear4bit(K, N, bias=bias, **{"quant_type": "nf4", "compute_dtype": torch.bfloat16} | options)
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False  # else its first forward would repack the weight
    return layer


def assert_same_weight(a, b):
    assert (a.shape, a.dtype, a.block_size, a.codebook) == (b.shape, b.dtype, b.block_size, b.codebook)
    assert a.scale_codebook == b.scale_codebook
    for name in ("packed", "absmax", "scale_absmax", "scale_offset", "code", "scale_code"):
        left, right = getattr(a, name), getattr(b, name)
        assert left is right is None or torch.equal(left, right), name


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("scale_codebook", [None, "dynamic8", "e4m3"])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_a_weight_there_and_back(codebook, scale_codebook, shape):
    options = {"double_quant": scale_codebook is not None, "scale_codebook": scale_codebook or "e4m3"}
    for block_size in (32, 64, 4096):
        qweight = nf4.quantize(torch.randn(shape).half(), codebook, block_size, **options)
        packed, state = to_bnb(qweight)
        assert packed.shape == ((qweight.shape[0] * qweight.shape[1] + 1) // 2, 1)
        assert_same_weight(from_bnb((packed, state)), qweight)
        if shape[1] % block_size == 0:  # where bitsandbytes' own decodes right on every CPU
            assert torch.equal(functional.dequantize_4bit(packed, state), nf4.dequantize(qweight, torch.float16))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_there_and_back(nested, storage):
    layer = linear4bit(48, 128, compress_statistics=nested, quant_storage=storage).eval()
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    y = layer(x)  # which casts bias in place
    state = layer.state_dict()
    ours = from_bnb(layer)
    assert type(ours) is nf4.QuantLinear
    assert not ours.training
    assert ours.compute_dtype is torch.bfloat16
    assert ours.bias is layer.bias
    assert_same_weight(ours.qweight, from_bnb(layer.weight))
    torch.testing.assert_close(ours(x), y, atol=0.02, rtol=0.02)

    back = to_bnb(ours, storage)
    assert type(back) is bnb.nn.Linear4bit
    assert not back.training
    assert back.weight.quant_storage == storage
    assert back.compute_dtype is torch.bfloat16
    again = back.state_dict()
    assert again.keys() == state.keys()
    for name, tensor in state.items():  # as bytes: packed ones may be NaN in their storage dtype
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_model_in_place():
    model = nn.Sequential(linear4bit(64, 64), nn.ReLU(), nn.Sequential(linear4bit(32, 64, False)), nn.Linear(32, 2))
    model.append(model[0])  # one layer in two places
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    states = [model[0].state_dict(), model[2][0].state_dict()]
    assert from_bnb(model) is model
    assert [type(m).__name__ for m in model] == ["QuantLinear", "ReLU", "Sequential", "Linear", "QuantLinear"]
    assert model[4] is model[0]
    model[0](torch.randn(1, 64))
    assert seen == [1], "hooks stay"
    assert to_bnb(model) is model
    assert model[4] is model[0]
    for layer, state in zip((model[0], model[2][0]), states):
        assert all(map(torch.equal, layer.state_dict().values(), state.values()))


def test_state_dicts_both_ways():
    model = nn.Sequential(linear4bit(64, 64), nn.Sequential(linear4bit(50, 96, compress_statistics=False)), nn.ReLU())
    state = model.state_dict()
    ours = from_bnb(state)
    from_bnb(model)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
    model.load_state_dict(ours)
    again = to_bnb(model.state_dict())
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_refusals():
    def refused(kind, words, function, *args):
        with pytest.raises(kind, match=words):
            function(*args)

    weight = torch.randn(4, 64)
    for codebook in ("int4", "af4", torch.linspace(-1, 1, 16)):
        name = codebook if isinstance(codebook, str) else "custom"
        refused(ValueError, f"must be 'nf4' or 'fp4'.*got '{name}'", to_bnb, nf4.quantize(weight, codebook))
        layer = nf4.QuantLinear(64, 4, codebook=codebook)
        refused(ValueError, f"must be 'nf4' or 'fp4'.*got '{name}'", to_bnb, layer)
        refused(ValueError, f"must be 'nf4' or 'fp4'.*got '{name}'", to_bnb, layer.state_dict())
    adapted = nn.Sequential(nf4.QuantLinear(64, 4), nf4.QuantLinear(64, 4, lora=nf4.LoraConfig(r=2)))
    refused(ValueError, r"to_bnb: 1 must have no adapters, got \['default'\]", to_bnb, adapted)
    assert type(adapted[0]) is nf4.QuantLinear  # nothing was exchanged
    refused(ValueError, "must hold a Linear4bit, got a Linear without one", from_bnb, nn.Linear(2, 2))
    refused(ValueError, "must hold a QuantModule, got a Linear without one", to_bnb, nn.Linear(2, 2))
    refused(ValueError, "Linear4bit: the weight must be quantized", from_bnb, bnb.nn.Linear4bit(64, 4))
    refused(TypeError, "from_bnb: obj must be a module.* got Tensor", from_bnb, weight)
    refused(TypeError, "to_bnb: obj must be a module.* got Tensor", to_bnb, weight)
    packed = functional.quantize_4bit(torch.randn(2, 4, 64), quant_type="nf4")
    refused(ValueError, r"shape .* must be \[N, K\], got \[2, 4, 64\]", from_bnb, packed)
    refused(ValueError, "by its scales, got 1", to_bnb, nf4.QuantLinear(8, 2).state_dict())
    hooked = nn.Sequential(linear4bit(4, 64))
    hooked[0]._hf_hook = object()
    refused(ValueError, "0 must not be under accelerate's hooks", from_bnb, hooked)


def test_a_state_that_bitsandbytes_cannot_hold_is_refused():
    ordered = nf4.quantize(torch.randn(32, 64))
    ordered = dataclasses.replace(ordered, column_order=torch.randperm(64).int())
    for qweight, words in ((ordered, "permuted columns"), (nf4.quantize(torch.randn(32, 64), "int8"), "got int8")):
        with pytest.raises(ValueError, match=words):
            to_bnb(nf4.QuantLinear.from_quantized(qweight).state_dict())


def test_a_lone_layer_keeps_its_hooks():
    layer, called = linear4bit(32, 64), []
    layer.register_forward_hook(lambda *_: called.append(True))
    from_bnb(layer)(torch.randn(2, 64))
    assert called
