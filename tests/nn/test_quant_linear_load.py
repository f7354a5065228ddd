"""What QuantLinear refuses to load: the key is named, and nothing changes."""

import pytest
import torch
from support.cases import Layout
from torch import nn

from nf4kernels import LoraConfig, QuantLinear


def layer(layout=Layout(), K=128, N=32, lora=None, bias=True):  # noqa: B008
    return QuantLinear(K, N, bias, lora=lora, dtype=torch.float32, **layout.options)


def changed(key, function):
    def change(state):
        state[key] = function(state[key])

    return change


# name -> (the layer that loads, the state, a change to it, the key that the message names)
REFUSED = {
    "shape": (layer(), layer(N=33), None, "weight"),
    "transposed-shape": (layer(K=128, N=64), layer(K=64, N=128), None, "weight"),
    "block-size": (layer(), layer(Layout(32)), None, "absmax"),
    "double-quant-into-plain": (layer(Layout(scale_codebook=None)), layer(), None, "absmax"),
    "plain-into-double-quant": (layer(), layer(Layout(scale_codebook=None)), None, "absmax"),
    "codebook": (layer(), layer(Layout(codebook="af4")), None, "code"),
    "dense-weight": (layer(), nn.Linear(128, 32), None, "weight"),
    "weight-int8": (layer(), layer(), changed("weight", lambda t: t.char()), "weight"),
    "weight-float-bytes": (layer(), layer(), changed("weight", lambda t: t.float()), "weight"),
    "weight-flat": (layer(), layer(), changed("weight", lambda t: t.view(-1, 1)), "weight"),
    "scale-half": (layer(), layer(), changed("scale_absmax", lambda t: t.half()), "scale_absmax"),
    "offset-1d": (layer(), layer(), changed("scale_offset", lambda t: t.view(1)), "scale_offset"),
    "scale_code-short": (layer(), layer(), changed("scale_code", lambda t: t[:255]), "scale_code"),
    "source_dtype-float": (layer(), layer(), changed("source_dtype", lambda t: t.float()), "source_dtype"),
    "missing": (layer(), layer(), lambda state: state.pop("scale_absmax"), "scale_absmax"),
    "unexpected": (layer(), layer(), lambda state: state.update(extra=torch.zeros(1)), "extra"),
    "adapter-into-plain": (layer(), layer(lora=LoraConfig(r=4)), None, "lora_A.weight"),
    "plain-into-adapter": (layer(lora=LoraConfig(r=4)), layer(), None, "lora_A.weight"),
    "adapter-rank": (layer(lora=LoraConfig(r=4)), layer(lora=LoraConfig(r=8)), None, "lora_A.weight"),
    "bias-shape": (layer(), layer(), changed("bias", lambda t: t[:31]), "bias"),
    "bias-missing": (layer(), layer(bias=False), None, "bias"),
}


@pytest.mark.parametrize("prefix", ["", "model.0."])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refuses_by_key(case, assign, prefix):
    target, source, change, key = case
    state = source.state_dict()
    if change is not None:
        change(state)
    module = target if not prefix else nn.ModuleDict({"model": nn.Sequential(target)})
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"{prefix}{key}".replace(".", r"\.")):
        module.load_state_dict({prefix + k: v for k, v in state.items()}, strict=True, assign=assign)
    for name in target._buffers | {"weight": target.weight}:
        after = getattr(target, name)
        if after is not None:
            assert after.dtype == before[prefix + name].dtype, name
    if key not in ("bias", "extra", "lora_A.weight", "scale_absmax"):  # torch copies what fits before it reports these
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} changed"


def test_a_custom_codebook_comes_with_the_state():
    levels = torch.linspace(-1, 1, 16)
    source = QuantLinear(128, 32, codebook=levels, dtype=torch.float32)
    target = QuantLinear(128, 32, codebook=torch.linspace(-0.9, 0.9, 16), dtype=torch.float32)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.code, levels)
    x = torch.randn(3, 128)
    assert torch.equal(target(x), source(x))


def test_strict_false_still_refuses_another_shape():
    target, source = layer(), layer(N=33)
    before = target.weight.clone()
    with pytest.raises(RuntimeError, match="weight must be"):
        target.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(target.weight, before)


@pytest.mark.parametrize("bad", [3, 255])
def test_source_dtype_out_of_range(bad):
    """A corrupted byte is refused when it is loaded, or named when it is used; never an IndexError from inside."""
    target = layer()
    state = target.state_dict()
    state["source_dtype"] = torch.tensor(bad, dtype=torch.uint8)
    with pytest.raises((RuntimeError, ValueError), match="source_dtype"):
        target.load_state_dict(state)
