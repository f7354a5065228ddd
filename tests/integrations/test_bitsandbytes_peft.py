"""PEFT's adapters on bitsandbytes' Linear4bit, patched: trained, merged, unmerged and saved in any order."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn

import nf4kernels as nf4
from nf4kernels.integrations.bitsandbytes import patch, unpatch


@pytest.fixture(autouse=True)
def patched():
    patch()
    yield
    unpatch()


class Net(nn.Module):
    """Two 4-bit layers; neither K is a multiple of the block size."""

    is_loaded_in_4bit = True  # what PEFT asks

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = {"compute_dtype": torch.float32, "quant_type": "nf4"}
        self.up = bnb.nn.Linear4bit(32, 72, **options)
        self.down = bnb.nn.Linear4bit(72, 32, bias=False, **options)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def adapted(**options):
    net = Net().to("cpu")
    with torch.no_grad():
        net.eval()(torch.randn(2, 32))  # where bitsandbytes alone would repack the weights
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], **options)
    model = get_peft_model(net, config)
    assert isinstance(model.base_model.model.up, LoraLinear4bit)
    return model


def train(model, steps=15):
    """The loss of each step; between steps the model is evaluated."""
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(64, 32, generator=generator), torch.randn(64, 32, generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = (model.train()(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            model.eval()(x)
    return losses


def dense(model):
    """The same net with Ŵ, and PEFT's own adapters on nn.Linear: trained as `train` does, the same losses."""
    base = nn.Module.__new__(Net)
    nn.Module.__init__(base)
    base.is_loaded_in_4bit = False
    for name in ("up", "down"):
        layer = getattr(model.base_model.model, name).base_layer
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight.data = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if layer.bias is not None:
            linear.bias.data = layer.bias.data.clone()
        setattr(base, name, linear)
    other = get_peft_model(base, model.peft_config["default"])
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    return other


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_training_is_that_of_the_dense_net(options):
    model = adapted(**options)
    other = dense(model)
    losses, expected = train(model), train(other)
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)


def values_of(layer):
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def assert_quantized(layer, values):
    """The layer holds our bytes of these values."""
    qweight = nf4.quantize(values, scale_codebook="dynamic8")
    state = layer.weight.quant_state
    assert torch.equal(layer.weight.data.view(-1), qweight.packed.view(-1))
    assert torch.equal(state.absmax, qweight.absmax.view(-1))
    assert torch.equal(state.offset, qweight.scale_offset)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_merging_and_unmerging(options):
    model = adapted(**options)
    train(model)
    x, lora = torch.randn(16, 32), model.base_model.model.up
    with torch.no_grad():
        y, layer_y = model(x), lora(x)
        before, delta = values_of(lora.base_layer), lora.get_delta_weight("default")
    model.merge_adapter(safe_merge=True)
    merged = values_of(lora.base_layer)
    if not options:
        assert_quantized(lora.base_layer, before + delta)
    # A weight moves by half a step of the codebook at most, which leaves the outputs this near.
    step = nf4.codebook.NF4.diff().max() / 2
    with torch.no_grad():
        assert (model(x) - y).norm() < step * y.norm()
        assert (lora(x) - layer_y).norm() < step * layer_y.norm()
    model.unmerge_adapter()
    if not options:
        assert_quantized(lora.base_layer, merged - delta)
    assert (values_of(lora.base_layer) - before).norm() < 2 * step * before.norm()


def test_saving_and_loading(tmp_path):
    model = adapted()
    train(model)
    base = {name: value.clone() for name, value in model.base_model.model.up.base_layer.state_dict().items()}
    model.save_pretrained(tmp_path / "adapter")
    x = torch.randn(4, 32)
    with torch.no_grad():
        y = model(x)
    again = PeftModel.from_pretrained(Net().to("cpu"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(x), y)
    state = again.base_model.model.up.base_layer.state_dict()
    assert state.keys() == base.keys()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    whole = again.state_dict()  # the quantized base with it
    fresh = get_peft_model(Net(), LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"]))
    fresh.load_state_dict(whole)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), y)


def test_deleting_the_adapter_leaves_the_base():
    model = adapted()
    x = torch.randn(4, 32)
    with torch.no_grad(), model.disable_adapter():
        y = model(x)
    train(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), y)
    base = model.unload()
    assert type(base.up) is bnb.nn.Linear4bit
    with torch.no_grad():
        assert torch.equal(base(x), y)
