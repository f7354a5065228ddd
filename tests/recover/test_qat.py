"""prepare_qat, qat_train, convert_qat: the layers of quantize_model, trained, and in 4 bits without a bit of change."""

import copy

import pytest
import torch
from support.byte_lm import ByteLM
from support.small_model import OPTIONS, QUANTIZED, Net
from torch import nn
from torch.utils.checkpoint import checkpoint

import nf4kernels as nf4
from nf4kernels.recover import (
    FakeQuantLinear,
    agreement,
    convert_qat,
    fake_quantize,
    prepare_qat,
    qat_train,
    remove_qat,
)
from nf4kernels.recover.batches import logits_in, run


def ids(rows=4, length=24, seed=0):
    return torch.randint(0, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


def nudged(model, seed=0):
    """Adapters that are no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, FakeQuantLinear) and module.lora is not None:
            module.lora_B.weight.data.copy_(0.02 * torch.randn(module.lora_B.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("skip", [(), ("q_proj",)])
def test_the_layers_are_those_of_quantize_model(skip):
    model, rounded = Net(), Net()
    names = prepare_qat(model, skip)
    report = nf4.quantize_model(rounded, skip, **OPTIONS)
    assert names == [layer.name for layer in report.layers]
    assert names == [name for name in QUANTIZED if "q_proj" not in skip or "q_proj" not in name]
    assert [name for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)] == names


def test_a_second_call_changes_nothing_and_quantize_model_leaves_them():
    model = Net()
    prepare_qat(model)
    before = dict(model.named_modules())
    assert prepare_qat(model) == []
    nf4.quantize_model(model, **OPTIONS)
    assert dict(model.named_modules()) == before
    assert convert_qat(Net(), **OPTIONS).layers == []


def test_tied_weights_are_left():
    model = Net()
    model.down = nn.Linear(96, 50, bias=False)
    model.lm_head = nn.Linear(96, 50, bias=False)
    model.lm_head.weight = model.down.weight
    assert "down" not in prepare_qat(model)


def test_parameters_hooks_modes_and_shared_modules_stay():
    model = Net()
    model.layers[1].q_proj = model.layers[0].q_proj
    model.layers[0].eval()
    calls = []
    model.down.register_forward_hook(lambda *_: calls.append(1))
    parameters, state = dict(model.named_parameters()), set(model.state_dict())
    prepare_qat(model)
    assert all(parameters[name] is each for name, each in model.named_parameters())
    assert set(model.state_dict()) == state
    assert model.layers[1].q_proj is model.layers[0].q_proj
    assert not model.layers[0].q_proj.training
    assert model.layers[1].up_proj.training
    model(ids())
    report = convert_qat(model, **OPTIONS)
    assert [layer.name for layer in report.layers] == [name for name in QUANTIZED if name != "layers.1.q_proj"]
    assert model.layers[1].q_proj is model.layers[0].q_proj
    model(ids())
    assert len(calls) == 4  # two layers call it twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, nf4.LoraConfig(r=4, alpha=8)])
@pytest.mark.parametrize("options", [{}, {"codebook": "mxfp4"}, {"double_quant": False, "block_size": 32}], ids=str)
def test_conversion_changes_no_bit_of_the_model(options, lora, dtype):
    model = Net().to(dtype)
    prepare_qat(model, lora_merged=lora, **options)
    nudged(model)
    expected = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    outputs = model(ids())
    report = convert_qat(model, **OPTIONS)
    assert len(report.layers) == len(expected) == len(QUANTIZED)
    for name, weight in expected.items():
        converted = model.get_submodule(name)
        assert isinstance(converted, nf4.QuantLinear)
        assert converted.lora is None
        assert torch.equal(converted.dequantize(dtype), weight)
    assert torch.equal(model(ids()), outputs)
    assert 0 < report.rms_error < 0.2
    assert report.model_bytes_after < report.model_bytes_before


def test_conversion_is_quantize_model_of_the_merged_weights():
    model = Net()
    prepare_qat(model, lora_merged=nf4.LoraConfig(r=4))
    nudged(model)
    dense = copy.deepcopy(model)
    assert remove_qat(dense) == QUANTIZED
    assert all(type(dense.get_submodule(name)) is nn.Linear for name in QUANTIZED)
    report = nf4.quantize_model(dense, **OPTIONS)
    converted = convert_qat(model, **OPTIONS)
    assert [layer.rms_error for layer in report.layers] == [layer.rms_error for layer in converted.layers]
    assert torch.equal(dense(ids()), model(ids()))


def test_a_merged_adapter_rounds_without_loss_and_an_ordinary_one_does_not():
    """What LoRA over rounded weights learned is lost in part when it is merged and rounded again; this is not."""
    model = ByteLM()
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), **OPTIONS)
    for module in model.modules():
        if isinstance(module, nf4.QuantLinear):
            module.lora_B.weight.data.normal_(std=0.02)
    before = logits_in(run(model, ids()))
    nf4.merge_model(model)
    nf4.quantize_model(model, **OPTIONS)
    assert not torch.allclose(before, logits_in(run(model, ids())), atol=1e-3)
    merged = ByteLM()
    prepare_qat(merged, lora_merged=nf4.LoraConfig(r=4))
    nudged(merged)
    before = logits_in(run(merged, ids()))
    convert_qat(merged, **OPTIONS)
    assert torch.equal(before, logits_in(run(merged, ids())))


def test_training_lowers_the_loss_of_the_converted_model():
    reference, batches = ByteLM(), [ids(seed=seed) for seed in range(4)]
    plain = copy.deepcopy(reference)
    nf4.quantize_model(plain, **OPTIONS)
    for lora in (None, nf4.LoraConfig(r=4)):
        model = copy.deepcopy(reference)
        prepare_qat(model, lora_merged=lora)
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        losses = qat_train(model, batches * 8, learning_rate=3e-3, progress=False)
        assert len(losses) == 32
        assert losses[-1] < losses[0] - 0.1
        assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
        assert bool(frozen) == (lora is not None)
        convert_qat(model, **OPTIONS)
        rounded, trained = (agreement(each, reference, batches).loss for each in (plain, model))
        assert trained < rounded - 0.1


def test_the_loss_is_the_callers():
    reference, model = ByteLM(), ByteLM()
    prepare_qat(model)

    def divergence(student, batch):
        q, p = (logits_in(run(each, batch)).log_softmax(-1) for each in (student, reference))
        return nn.functional.kl_div(q, p.detach(), reduction="batchmean", log_target=True) / q.shape[1]

    before = agreement(model, reference, [ids()]).kl
    qat_train(model, [ids()] * 20, divergence, learning_rate=1e-3, progress=False)
    assert agreement(model, reference, [ids()]).kl < 0.7 * before


def test_a_given_optimizer_keeps_its_rate():
    model = nn.Sequential(nn.Linear(64, 4))
    prepare_qat(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    batch = {"input": torch.ones(2, 64), "labels": torch.tensor([0, 3])}
    qat_train(model, [batch] * 3, optimizer=optimizer, progress=False)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_state_goes_to_a_dense_model_and_back(tmp_path):
    model = ByteLM()
    prepare_qat(model)
    qat_train(model, [ids()] * 2, learning_rate=1e-2, progress=False)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = ByteLM(seed=7)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    prepare_qat(other)
    assert torch.equal(logits_in(run(model, ids())), logits_in(run(other, ids())))
    again = ByteLM(seed=8)
    prepare_qat(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits_in(run(model, ids())), logits_in(run(again, ids())))


def test_checkpointed_layers_train_the_same():
    class Checkpointed(ByteLM):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return {"logits": self.lm_head(self.norm(x))}

    losses = []
    for kind in (ByteLM, Checkpointed):
        model = kind()
        prepare_qat(model)
        losses.append(qat_train(model, [ids()] * 4, learning_rate=1e-3, progress=False))
    assert losses[0] == losses[1]


def test_a_compiled_model_computes_the_same_and_a_full_graph_is_refused():
    model = ByteLM()
    prepare_qat(model)
    expected = logits_in(run(model, ids()))
    assert torch.allclose(torch.compile(model, backend="eager")(ids())["logits"], expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Data-dependent branching"):
        torch.compile(model, backend="eager", fullgraph=True)(ids())
    torch._dynamo.reset()


def test_a_compiled_model_is_prepared_and_converted():
    model = torch.compile(ByteLM(), backend="eager")
    names = prepare_qat(model)
    assert names[0] == "layers.0.q_proj"
    assert len(convert_qat(model, **OPTIONS).layers) == len(names) == 14


def test_what_is_refused_leaves_the_model():
    model = Net()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="skip must match a layer, got 'nothing'"):
        prepare_qat(model, ["nothing"])
    with pytest.raises(TypeError, match="skip must be a sequence of names, got 'down'"):
        prepare_qat(model, "down")
    with pytest.raises(TypeError, match="lora_merged must be a LoraConfig or None, got dict"):
        prepare_qat(model, lora_merged={"r": 4})
    with pytest.raises(ValueError, match="block_size must be"):
        prepare_qat(model, block_size=17)
    model.down.weight.data[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"prepare_qat: layer down: .*got inf at row 3, column 5"):
        prepare_qat(model, lora_merged=nf4.LoraConfig())
    assert dict(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="model must contain its layers, got a Linear itself"):
        prepare_qat(nn.Linear(8, 8))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient, got none"):
        qat_train(model, [ids()], progress=False)


def test_a_weight_that_became_nan_is_named():
    model = Net()
    prepare_qat(model)
    model.down.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"convert_qat: layer down: .*got nan at row 0, column 0"):
        convert_qat(model, **OPTIONS)
    assert isinstance(model.down, FakeQuantLinear)


def test_fake_quantize_is_what_the_layer_rounds():
    model = Net()
    weight = model.down.weight
    prepare_qat(model, codebook="fp4")
    assert torch.equal(model.down.dequantize(), fake_quantize(weight, codebook="fp4"))
