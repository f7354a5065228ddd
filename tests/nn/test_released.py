"""Parameters as DeepSpeed's ZeRO-3 releases and gathers them, here by hand: it puts other data into them, and marks."""

import pytest
import torch
from support import tiny

import nf4kernels as nf4
from nf4kernels.nn import checksum
from nf4kernels.nn.quant_module import QuantModule

LORA = nf4.LoraConfig(r=4, init="gaussian")
REFUSED = "must be whole, got it released by DeepSpeed's ZeRO-3: gather it first, on every rank"


def release(module: torch.nn.Module) -> dict[torch.nn.Parameter, torch.Tensor]:
    """What ZeRO-3 leaves of parameters outside a forward; the values that they had."""
    had = {}
    for parameter in module.parameters():
        had[parameter] = parameter.data
        parameter.ds_numel, parameter.ds_tensor = parameter.numel(), parameter.data.flatten()[::2].clone()
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return had


def gather(had: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Into memory that was not there before, as an all-gather does."""
    for parameter, values in had.items():
        parameter.data = values.clone()


def layer(**options) -> nf4.QuantLinear:
    torch.manual_seed(0)
    return nf4.QuantLinear(128, 96, bias=True, lora=LORA, dtype=torch.float32, **options)


def test_a_backward_after_another_gather():
    """Forward, release, gather elsewhere, backward: autograd has kept the parameter itself, and no bytes."""
    own, plain = layer(), layer()
    own.load_state_dict(plain.state_dict())
    x = torch.randn(5, 128, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    had = release(own)
    gather(had)
    y = own(x)
    for parameter in had:
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    gather(had)
    y.square().sum().backward()
    plain(same).square().sum().backward()
    assert torch.equal(x.grad, same.grad)
    for parameter, expected in zip(own.parameters(), plain.parameters()):
        assert (parameter.grad is None) == (expected.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, expected.grad)


def test_to_release_and_to_gather_is_no_write(monkeypatch):
    own = layer()
    own(torch.randn(2, 128))
    monkeypatch.setattr(checksum, "checksum", lambda *_: pytest.fail("the bytes are read anew"))
    had = release(own)
    gather(had)
    own(torch.randn(2, 128))


def test_other_bytes_that_are_gathered_are_seen_after_a_cast():
    """DeepSpeed moves the module to its device once; what it gathers after that is compared with the checksum."""
    own = layer()
    had = release(own)
    own.to(torch.device("cpu"))
    had[own.weight] = had[own.weight] ^ 255
    gather(had)
    with pytest.raises(RuntimeError, match="must stay as quantize made them"):
        own(torch.randn(2, 128))


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_cast_while_released(cast):
    own = layer()
    expected = own.dequantize(torch.float32)
    had = release(own)
    getattr(own, cast)()
    for parameter in (own.weight, own.absmax):
        assert parameter.dtype == torch.uint8
    gather({parameter: values for parameter, values in had.items() if parameter.dtype == torch.uint8})
    assert torch.equal(own.dequantize(torch.float32), expected)
    assert own.scale_absmax.dtype == own.code.dtype == own.scale_code.dtype == torch.float32


def test_what_needs_the_bytes_is_refused(tmp_path):
    model = tiny.Net()
    nf4.quantize_model(model, lora=LORA, progress=False)
    own = model.blocks[0][0]
    nf4.save_adapters(model, tmp_path / "adapters")
    release(model)
    for call in (
        lambda: own.qweight, own.dequantize, own.to_linear,
        lambda: nf4.save_adapters(model, tmp_path / "out"), lambda: nf4.save_checkpoint(model, tmp_path / "out"),
        lambda: nf4.load_adapters(model, tmp_path / "adapters"), lambda: nf4.merge_model(model),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert not (tmp_path / "out").exists()
    assert all(isinstance(module, QuantModule) for module in (own, model.blocks[1][2]))


def test_experts_alone_are_not_saved_empty(tmp_path):
    model = tiny.make("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    nf4.quantize_model(model, skip=("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"), progress=False)
    assert any(isinstance(module, nf4.QuantExperts) for module in model.modules())
    assert not tiny.layers(model)
    release(model)
    with pytest.raises(ValueError, match=REFUSED):
        nf4.save_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_released_dense_weight_is_not_quantized():
    model = tiny.Net()
    release(model)
    with pytest.raises(ValueError, match=f"blocks.0.0 {REFUSED}"):
        nf4.quantize_model(model, progress=False)
    with pytest.raises(ValueError, match=REFUSED):
        nf4.QuantLinear.from_linear(model.blocks[0][0])


def test_an_engines_state_is_empty_where_the_layer_is():
    """DeepSpeed saves released parameters as they are, loads that, and then puts its parts into place."""
    own, other = layer(), layer(codebook="fp4")
    whole = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    had = release(own)
    state = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    assert state["weight"].numel() == state["absmax"].numel() == 0
    own.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight: this layer's is released by DeepSpeed's ZeRO-3, gather it first"):
        own.load_state_dict(whole)
    with pytest.raises(RuntimeError, match="code must be the nf4 codebook"):
        own.load_state_dict({**state, "code": other.code})
    gather(had)
    assert torch.equal(own.dequantize(), layer().dequantize())
    with pytest.raises(RuntimeError, match="weight must be torch"):
        own.load_state_dict(state)
