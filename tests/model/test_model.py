"""quantize_model: what is replaced, what is left alone and why, and that errors change nothing."""

import copy
import math
import weakref

import pytest
import torch
from support.small_model import OPTIONS, QUANTIZED, Net
from support.unchanged import assert_unchanged, snapshot
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import nf4kernels as nf4
from nf4kernels.model import quantize as model_module


class Conv1D(nn.Module):
    """transformers' Conv1D: the weight is `[in, out]`."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 32, 64))


class SubclassedLinear(nn.Linear):
    pass


def reasons(report):
    return {entry.name: entry.reason for entry in report.skipped}


def test_every_linear_but_the_head_is_replaced():
    model, ids = Net(), torch.randint(0, 50, (2, 5))
    dense = copy.deepcopy(model)
    report = nf4.quantize_model(model, **OPTIONS)
    assert [layer.name for layer in report.layers] == QUANTIZED
    assert [n for n, m in model.named_modules() if isinstance(m, nf4.QuantLinear)] == QUANTIZED
    assert reasons(report) == {"embed": "an embedding", "lm_head": "skip='lm_head'"}
    for name in QUANTIZED:
        expected = nf4.quantize(dense.get_submodule(name).weight)
        assert torch.equal(model.get_submodule(name).weight, expected.packed)
        assert torch.equal(model.get_submodule(name).absmax, expected.absmax)
        dense.get_submodule(name).weight.data = nf4.dequantize(expected, torch.float32)
    # Two fp32 products of at most 96 terms a layer, summed in another order.
    torch.testing.assert_close(model(ids), dense(ids), rtol=0, atol=96 * 2**-23 * dense(ids).abs().max().item())


def test_report_numbers_are_those_of_the_weights():
    model = Net()
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in QUANTIZED}
    report = nf4.quantize_model(model, **OPTIONS)
    error_sum = weight_sum = 0.0
    for layer in report.layers:
        weight = weights[layer.name].double()
        quantized = model.get_submodule(layer.name)
        difference = quantized.dequantize(torch.float32).double() - weight
        assert layer.shape == tuple(weight.shape)
        assert layer.kind == layer.name.split(".")[-1]
        assert layer.bytes_before == weight.numel() * 4
        state = quantized.state_dict()
        state.pop("bias", None)
        assert layer.bytes_after == sum(tensor.nbytes for tensor in state.values())
        # The differences are rounded to fp32 once before they are summed.
        assert layer.rms_error == pytest.approx((difference.norm() / weight.norm()).item(), rel=2**-23)
        error_sum += difference.square().sum().item()
        weight_sum += weight.square().sum().item()
    assert report.rms_error == pytest.approx(math.sqrt(error_sum / weight_sum), rel=2**-23)
    assert report.bytes_before == sum(layer.bytes_before for layer in report.layers)
    assert report.bytes_after == sum(layer.bytes_after for layer in report.layers)
    tensors = [*model.parameters(), *model.buffers()]
    assert report.model_bytes_after == sum(tensor.nbytes for tensor in tensors)
    assert report.model_bytes_before - report.model_bytes_after == report.bytes_before - report.bytes_after
    assert {kind: len(layers) for kind, layers in report.by_kind().items()} == {"q_proj": 2, "up_proj": 2, "down": 1}


def test_report_reads_as_a_table():
    report = nf4.quantize_model(Net(), **OPTIONS)
    text = str(report)
    for name in [*QUANTIZED, "all q_proj (2)", "all quantized (5)", "whole model", "lm_head", "an embedding"]:
        assert name in text
    assert "layers.0.q_proj" not in report.summary()
    assert "all up_proj (2)" in report.summary()
    widths = {len(line) for line in text.split("\n\n")[0].splitlines() if "|" not in line and "whole" not in line}
    assert len(widths) == 1, "the rows of the table are not aligned"
    assert str(nf4.QuantizeReport())


def test_slices_do_not_change_the_error(monkeypatch):
    model = Net()
    other = copy.deepcopy(model)
    whole = nf4.quantize_model(model, **OPTIONS)
    monkeypatch.setattr(model_module, "SMALLEST_SLICE", 100)
    assert nf4.quantize_model(other, **OPTIONS).rms_error == pytest.approx(whole.rms_error, rel=1e-12)


def test_second_call_changes_nothing():
    model = Net()
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), **OPTIONS)
    before, layers = snapshot(model), [model.get_submodule(name) for name in QUANTIZED]
    report = nf4.quantize_model(model, **OPTIONS)
    assert report.layers == []
    assert [entry.name for entry in report.skipped if entry.reason == "already a QuantLinear"] == QUANTIZED
    assert_unchanged(model, before)
    assert all(model.get_submodule(name) is layer for name, layer in zip(QUANTIZED, layers))
    assert report.model_bytes_before == report.model_bytes_after


def test_what_is_not_an_nn_linear_stays_with_a_reason():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(20, 32),
            "head": nn.Linear(32, 20),
            "conv1d": Conv1D(32, 32),
            "experts": Experts(),
            "subclass": SubclassedLinear(32, 32),
            "conv": nn.Conv1d(4, 4, 3),
            "parametrized": parametrizations.orthogonal(nn.Linear(32, 32)),
            "weight_norm": torch.nn.utils.weight_norm(nn.Linear(32, 32)),
            "encoder": nn.TransformerEncoderLayer(32, 2, 64, batch_first=True),
            "lora_A": nn.Linear(32, 4),
            "plain": nn.Linear(32, 32),
        }
    )
    model["head"].weight = model["embed"].weight
    before = snapshot(model)[0]
    report = nf4.quantize_model(model, **OPTIONS)
    assert [layer.name for layer in report.layers] == ["plain"]
    found = reasons(report)
    assert found["embed"] == "an embedding"
    assert found["head"] == "tied to embed.weight"
    assert found["conv1d"] == "Conv1D keeps its weight as [in, out]"
    assert found["experts.up"] == "a 3-D parameter of Experts"
    assert found["subclass"] == "SubclassedLinear, a subclass of nn.Linear"
    assert "Conv1d" in found["conv"]
    assert any(name.startswith("parametrized") and "parametri" in reason.lower() for name, reason in found.items())
    assert found["weight_norm.weight_v"] == "its weight is computed by a hook"
    assert found["encoder.linear1"] == "TransformerEncoderLayer.forward reads its weight"
    assert "subclass" in found["encoder.self_attn.out_proj"]
    assert found["lora_A"] == "a LoRA factor"
    assert parametrize.is_parametrized(model["parametrized"])
    assert model["head"].weight is model["embed"].weight
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if not name.startswith("plain."))


def test_encoder_layer_still_runs_in_eval():
    """Its fused path hands linear1.weight to one native op, which would read packed bytes as a dense matrix."""
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), nn.Linear(32, 32)).eval()
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        expected = model[0](x)
        nf4.quantize_model(model, **OPTIONS)
        assert torch.equal(model[0](x), expected)


def test_one_module_under_two_names_is_replaced_under_both():
    model = Net()
    model.again = model.layers[0].q_proj
    model.block_again = model.layers[1]
    report = nf4.quantize_model(model, **OPTIONS)
    assert len(report.layers) == len(QUANTIZED)
    assert isinstance(model.again, nf4.QuantLinear)
    assert model.again is model.layers[0].q_proj
    assert model.block_again.up_proj is model.layers[1].up_proj
    assert nf4.merge_model(model) == QUANTIZED
    assert type(model.again) is nn.Linear
    assert model.again is model.layers[0].q_proj


def test_linears_tied_to_each_other_stay():
    model = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    model[1].weight = model[0].weight
    report = nf4.quantize_model(model, **OPTIONS)
    assert report.layers == []
    assert reasons(report) == {"0": "tied to 1.weight", "1": "tied to 0.weight"}


def test_views_of_one_storage_are_not_tied():
    flat = torch.randn(2 * 32 * 32)
    model = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    for i, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[i * 1024 : (i + 1) * 1024].view(32, 32))
    assert len(nf4.quantize_model(model, **OPTIONS).layers) == 2


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), []),
        (("layers.0.q_proj",), ["layers.0.q_proj"]),
        (("layers.0",), ["layers.0.q_proj", "layers.0.up_proj"]),
        (("1.up_proj",), ["layers.1.up_proj"]),
        (("up_proj",), ["layers.0.up_proj", "layers.1.up_proj"]),
        (("*.1.*",), ["layers.1.q_proj", "layers.1.up_proj"]),
        (["down", "q_proj"], ["layers.0.q_proj", "layers.1.q_proj", "down"]),
    ],
)
def test_skip_names(skip, left):
    report = nf4.quantize_model(Net(), skip=skip, **OPTIONS)
    assert [layer.name for layer in report.layers] == [name for name in QUANTIZED if name not in left]
    assert [entry.name for entry in report.skipped if entry.reason.startswith("skip=")] == [*left, "lm_head"]


def test_options_reach_the_layers():
    config = nf4.LoraConfig(r=3, dropout=0.1)
    model = Net()
    nf4.quantize_model(
        model, lora=config, codebook="fp4", block_size=32, double_quant=False, compute_dtype=torch.bfloat16, **OPTIONS
    )
    layer = model.down
    assert (layer.codebook, layer.block_size, layer.double_quant) == ("fp4", 32, False)
    assert layer.compute_dtype == torch.bfloat16
    assert layer.lora == config
    assert tuple(layer.lora_A.weight.shape) == (3, 96)


def test_modes_hooks_biases_and_flags_are_kept():
    model = Net()
    model.layers[0].eval()
    model.down.bias.requires_grad_(False)
    bias, calls = model.layers[0].up_proj.bias, []
    model.down.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    nf4.quantize_model(model, **OPTIONS)
    assert model.layers[0].up_proj.bias is bias
    assert not model.layers[0].q_proj.training
    assert model.layers[1].q_proj.training
    assert model.embed.weight.requires_grad
    assert not model.down.weight.requires_grad
    assert not model.down.bias.requires_grad
    model(torch.tensor([[1, 2]]))
    assert calls == [nf4.QuantLinear] * 2
    nf4.merge_model(model, dtype=torch.float32)
    assert not model.down.bias.requires_grad
    model(torch.tensor([[1, 2]]))
    assert calls[2:] == [nn.Linear] * 2


def test_meta_model():
    with torch.device("meta"):
        model = Net()
    report = nf4.quantize_model(model, **OPTIONS)
    assert [layer.name for layer in report.layers] == QUANTIZED
    assert model.down.weight.is_meta
    assert math.isnan(report.rms_error)
    with pytest.raises(ValueError, match="meta device"):
        nf4.merge_model(model)


def test_dense_weights_are_freed_on_the_way(monkeypatch):
    model = nn.ModuleList([nn.Linear(256, 256, bias=False) for _ in range(4)])
    weights = [weakref.ref(weight) for weight in model.parameters()]
    alive, original = [], model_module.QuantLinear.from_linear.__func__

    def counting(cls, linear, *args, **kwargs):
        alive.append(sum(weight() is not None for weight in weights))
        return original(cls, linear, *args, **kwargs)

    monkeypatch.setattr(model_module.QuantLinear, "from_linear", classmethod(counting))
    nf4.quantize_model(model, **OPTIONS)
    assert alive[1:] == [4, 3, 2, 1]  # the first call is the dry run on meta
    assert all(weight() is None for weight in weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_weight_is_named_and_nothing_changes(bad):
    model = Net()
    with torch.no_grad():
        model.layers[1].up_proj.weight[7, 9] = bad
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.up_proj must be finite, got .* at row 7, column 9"):
        nf4.quantize_model(model, **OPTIONS)
    assert_unchanged(model, before)
    nf4.quantize_model(model, nonfinite="propagate", double_quant=False, **OPTIONS)
    assert model.layers[1].up_proj.dequantize().isnan().any()


def test_float64_weight_is_named_and_nothing_changes():
    model = Net()
    model.down.double()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"the weight of down must be float32.*got torch\.float64"):
        nf4.quantize_model(model, **OPTIONS)
    assert_unchanged(model, before)


def test_failure_half_way_names_the_layer_and_can_be_continued(monkeypatch):
    model = Net()
    original = model_module.squared_error

    def fails_once(qweight, weight, start):
        if tuple(weight.shape) == (64, 96):
            raise MemoryError("out of memory")
        return original(qweight, weight, start)

    monkeypatch.setattr(model_module, "squared_error", fails_once)
    with pytest.raises(RuntimeError, match="layer down failed, those before it are replaced: out of memory"):
        nf4.quantize_model(model, **OPTIONS)
    assert [isinstance(model.get_submodule(name), nf4.QuantLinear) for name in QUANTIZED] == [True] * 4 + [False]
    monkeypatch.undo()
    assert [layer.name for layer in nf4.quantize_model(model, **OPTIONS).layers] == ["down"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"skip": "lm_head"}, TypeError, "skip must be a sequence of names"),
        ({"skip": (1,)}, TypeError, "skip must be a sequence of names"),
        *(
            ({"skip": (name,)}, ValueError, "skip must match a layer")
            for name in ("proj", "layers.00", "own", "ayers.0")
        ),
        ({"lora": 8}, TypeError, "lora must be a LoraConfig or None, got int"),
        ({"block_size": 48}, ValueError, "block_size must be one of"),
        ({"codebook": "nf5"}, ValueError, "codebook must be one of"),
        ({"scale_codebook": "e5m2"}, ValueError, "scale_codebook must be one of"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be"),
        ({"nonfinite": "propagate"}, ValueError, "must go with double_quant=False"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype must be"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_bad_arguments_change_nothing(options, error, message):
    model = Net()
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=rf"nf4kernels\.quantize_model: .*{message}"):
        nf4.quantize_model(model, **{**OPTIONS, **options})
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("function", [nf4.quantize_model, nf4.merge_model])
def test_bad_models(function):
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        function({})
    with pytest.raises(ValueError, match="model must contain its layers, got a Linear itself"):
        function(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="model must contain its layers, got a QuantLinear itself"):
        function(nf4.QuantLinear(4, 4))
