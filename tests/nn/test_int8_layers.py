"""int8 in layers and models: everything that a layer in 4 bits does, alone and beside layers in 4 bits."""

import copy

import pytest
import torch
from support import cases
from torch import nn

import nf4kernels
from nf4kernels import LoraConfig, QuantLinear, quantize_model


def linear(N=48, K=100, dtype=torch.bfloat16, bias=True):
    torch.manual_seed(N + K)
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def small_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 80), nn.GELU(), nn.Linear(80, 64))


MIXED = {"0": {"codebook": "int8", "block_size": 32}, "2": {"codebook": "nf4"}, "4": None}


def test_a_weight_says_its_bits_and_bytes():
    w = cases.weight(128, 256)
    for double_quant, bits in ((True, 8 + 8 / 64 + 32 / (64 * 256)), (False, 8 + 32 / 64)):
        qweight = nf4kernels.quantize(w, "int8", double_quant=double_quant)
        codebooks = qweight.code.nbytes + (qweight.scale_code.nbytes + 4 if double_quant else 0)
        assert qweight.bits == 8
        assert (qweight.nbytes - codebooks) * 8 == bits * w.numel()
        assert qweight.packed.shape == w.shape
    assert nf4kernels.quantize(w).bits == 4


def test_its_error_is_a_fifteenth_of_nf4s():
    """Uniform steps of absmax / 127 against the levels of NF4: theory for a Gaussian gives 0.006 against 0.092."""
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))

    def error(**options):
        return ((nf4kernels.dequantize(nf4kernels.quantize(w, **options), torch.float32) - w).norm() / w.norm()).item()

    assert 0.0050 < error(codebook="int8", double_quant=False) < 0.0060
    assert 0.0050 < error(codebook="int8") < 0.0080
    assert error() > 10 * error(codebook="int8")


def test_every_weight_is_the_nearest_integer_of_its_block():
    w = cases.weight(37, 100)
    qweight = nf4kernels.quantize(w, "int8", double_quant=False)
    flat, scale = w.reshape(-1).double(), qweight.absmax.double().repeat_interleave(64)[: w.numel()]
    integers = qweight.packed.view(torch.int8).reshape(-1).double()
    assert ((flat / scale - integers).abs() <= 0.5 + 1e-4).all()
    assert integers.abs().max() == 127
    assert integers.min() >= -127


def test_zeros_and_a_tie():
    w = torch.zeros(2, 64)
    w[1, :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5])
    qweight = nf4kernels.quantize(w, "int8", double_quant=False)
    assert qweight.packed[0].sum() == 0
    assert qweight.packed[1, :5].view(torch.int8).tolist() == [127, 0, 2, 2, 0]
    assert torch.equal(nf4kernels.dequantize(qweight, torch.float32)[0], torch.zeros(64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_is_refused_or_propagated(bad):
    w = cases.weight(4, 128)
    w[2, 70] = bad
    with pytest.raises(ValueError, match="row 2, column 70"):
        nf4kernels.quantize(w, "int8")
    qweight = nf4kernels.quantize(w, "int8", double_quant=False, nonfinite="propagate")
    decoded = nf4kernels.dequantize(qweight, torch.float32)
    assert decoded[2, 64:].isnan().all()
    assert decoded[:2].isfinite().all()


@pytest.mark.parametrize("change", [{"code": torch.zeros(16)}, {"codebook": "nf4"}])
def test_codebook_and_levels_must_agree(change):
    with pytest.raises(ValueError, match="must have shape"):
        cases.with_tensors(nf4kernels.quantize(cases.weight(4, 64), "int8"), **change)


def test_gradients_are_those_of_the_dense_product():
    qweight = nf4kernels.quantize(cases.weight(40, 96), "int8")
    w = nf4kernels.dequantize(qweight, torch.float32)
    x, A, B = (cases.activations(*shape, torch.float32, seed=i) for i, shape in enumerate([(7, 96), (4, 96), (40, 4)]))
    bias = torch.randn(40)
    ours = [t.clone().requires_grad_() for t in (x, A, B, bias)]
    theirs = [t.clone().requires_grad_() for t in (x, A, B, bias)]
    y = nf4kernels.lora_linear(ours[0], qweight, ours[1], ours[2], 0.5, ours[3])
    expected = theirs[0] @ w.T + 0.5 * theirs[0] @ theirs[1].T @ theirs[2].T + theirs[3]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    twice = torch.autograd.functional.hvp(lambda t: nf4kernels.linear(t, qweight).square().sum(), x, x)[1]
    torch.testing.assert_close(twice, 2 * x @ w.T @ w, rtol=1e-4, atol=1e-3)


def test_layer_state_casts_and_back():
    dense = linear()
    layer = QuantLinear.from_linear(dense, codebook="int8", lora=LoraConfig(r=4))
    other = QuantLinear(100, 48, codebook="int8", lora=LoraConfig(r=4))
    other.load_state_dict(layer.state_dict())
    x = cases.activations(3, 100, torch.bfloat16)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer).to(torch.float32).weight, layer.weight)
    assert torch.equal(layer.to_linear(torch.float32).weight, layer.dequantize(torch.float32))
    assert layer.quant_options["codebook"] == "int8"
    four = QuantLinear.from_linear(dense)
    for one, into in ((four, QuantLinear(100, 48, codebook="int8")), (layer, QuantLinear(100, 48))):
        with pytest.raises(RuntimeError, match=r"weight must be .* got"):
            into.load_state_dict(one.state_dict())
    layer.weight.zero_()
    with pytest.raises(RuntimeError, match="packed bytes"):
        layer(x)


def test_mixed_plan_and_checkpoint(tmp_path):
    dense = small_model()
    model = copy.deepcopy(dense)
    report = quantize_model(model, plan=MIXED, progress=False, lora=LoraConfig(r=4))
    assert [model[i].codebook for i in (0, 2)] == ["int8", "nf4"]
    assert type(model[4]) is nn.Linear
    eight, four = (layer.rms_error for layer in report.layers)
    assert four > 10 * eight > 0
    x = torch.randn(9, 64)
    model(x).square().sum().backward()
    assert model[0].lora_A.weight.grad is not None
    nf4kernels.save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = small_model()
    nf4kernels.load_checkpoint(loaded, tmp_path / "model.safetensors")
    assert [loaded[i].codebook for i in (0, 2)] == ["int8", "nf4"]
    assert torch.equal(loaded(x), model(x))
    nf4kernels.save_adapters(model, tmp_path / "adapters")
    again = copy.deepcopy(dense)
    quantize_model(again, plan=MIXED, progress=False)
    nf4kernels.load_adapters(again, tmp_path / "adapters")
    assert torch.equal(again(x), model(x))
    expected = model(x)
    nf4kernels.merge_model(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_tensors_on_disk():
    for double_quant in (True, False):
        for shape in ((37, 101), (16, 128)):
            qweight = nf4kernels.quantize(cases.weight(*shape), "int8", 32, double_quant)
            tensors = nf4kernels.weight_to_tensors(qweight, "w")
            assert "w.quant_state.nf4kernels__int8" in tensors
            back = nf4kernels.weight_from_tensors(tensors, "w")
            assert (back.codebook, back.bits) == ("int8", 8)
            for name in ("packed", "absmax", "code"):
                assert torch.equal(getattr(back, name), getattr(qweight, name))
            with pytest.raises(ValueError, match="must be 'nf4' or 'fp4' in bitsandbytes' format"):
                nf4kernels.weight_to_tensors(qweight, "w", bitsandbytes=True)
            tensors["w.quant_map"] = tensors["w.quant_map"][:16]
            with pytest.raises(ValueError, match="must hold 256 levels"):
                nf4kernels.weight_from_tensors(tensors, "w")


def test_experts():
    weights = cases.expert_weights(3, 40, 128)
    qexperts = nf4kernels.quantize_experts(weights, "int8")
    assert qexperts.packed.shape == (3, 40, 128)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    for dtype in cases.DTYPES:
        x = cases.activations(9, 128, dtype).requires_grad_()
        y = nf4kernels.grouped_linear(x, ends, qexperts)
        expected = torch.cat(
            [nf4kernels.linear(x[:2], qexperts[0]), nf4kernels.linear(x[2:7], qexperts[2]), torch.zeros(2, 40)]
        )
        assert torch.equal(y, expected.to(dtype))
        y.sum().backward()
        assert x.grad[:7].any(1).all()
        assert not x.grad[7:].any()


def test_compiled_and_on_meta():
    layer = QuantLinear.from_linear(linear(), codebook="int8")
    meta = QuantLinear(100, 48, codebook="int8", device="meta")
    assert meta.weight.shape == (48, 100)
    x = cases.activations(6, 100, torch.bfloat16)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
