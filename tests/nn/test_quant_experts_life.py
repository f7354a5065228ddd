"""QuantExperts through its life: copies, casts, state, meta, back to dense, and one graph."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from support.cases import DTYPES, Layout, dtype_id
from support.fused_experts import (
    INDEX,
    PARTS,
    WEIGHTS,
    H,
    X,
    fused,
    routed,
)
from torch import nn
from torch.nn.functional import silu
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import nf4kernels as nf4
from nf4kernels import QuantExperts, quantize_experts
from nf4kernels.nn.quant_module import SCALE_TENSORS


def assert_same(a, b):
    for name, tensor in b.state_dict().items():
        now = a.state_dict()[name]
        assert now.dtype == tensor.dtype, name
        assert torch.equal(now, tensor), name


def save_and_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": save_and_load}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_copies_are_separate_and_whole(duplicate):
    experts = QuantExperts.from_experts(fused()).eval()
    copied = duplicate(experts)
    assert_same(copied, experts)
    assert not copied.training
    for a, b in zip((*experts.parameters(), *experts.buffers()), (*copied.parameters(), *copied.buffers())):
        assert a.data_ptr() != b.data_ptr()
    x, index, weights = routed(9)
    assert torch.equal(copied(x, index, weights), experts(x, index, weights))
    dense = copied.to_experts()
    assert type(dense) is MixtralExperts
    assert not list(copied.gate_up_proj.children())
    assert dense.gate_up_proj.dtype == torch.float32


CASTS = {
    "half": lambda m: m.half(),
    "to-dtype": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
    "double-and-back": lambda m: m.double().float(),
    "in-a-model": lambda m: nn.Sequential(m).to("cpu", torch.float16)[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("layout", [Layout(), Layout(scale_codebook=None)], ids=str)
def test_casts_leave_the_weights_alone(cast, layout):
    experts = QuantExperts.from_experts(fused(), **layout.options)
    before = copy.deepcopy(experts)
    experts = cast(experts)
    assert_same(experts, before)
    assert experts.gate_up_proj.qweight.dtype == torch.float32
    x, index, weights = routed(9, 2, torch.bfloat16)
    assert torch.equal(experts(x, index, weights), before(x, index, weights))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
def test_state_dict_round_trip(meta, assign):
    experts = QuantExperts.from_experts(fused())
    with torch.device("meta" if meta else "cpu"):
        other = QuantExperts.from_experts(fused())
    if meta:
        assert all(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
        with pytest.raises(ValueError, match=r"nf4kernels.QuantExperts: the layer is on the meta device"):
            other.to_experts()
        other = other if assign else other.to_empty(device="cpu")
    state = experts.state_dict()
    assert set(state) == {
        f"{part}.{name}" for part in PARTS for name in ("weight", *SCALE_TENSORS, "source_dtype", "checksum")
    }
    result = other.load_state_dict({key: value.clone() for key, value in state.items()}, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(other, experts)
    x, index, weights = routed(9)
    assert torch.equal(other(x, index, weights), experts(x, index, weights))
    assert not any(parameter.requires_grad for parameter in other.parameters())


def changed(key, function):
    return lambda state: state.update({key: function(state[key])})


# A change to the state, or the layout of the module that it is from, and the key that the message names.
REFUSED_STATES = {
    "shape": (changed("down_proj.weight", lambda t: t[:, 1:]), "down_proj.weight must be"),
    "experts": (changed("gate_up_proj.weight", lambda t: t[1:]), "gate_up_proj.weight must be"),
    "dtype": (changed("down_proj.absmax", lambda t: t.float()), "down_proj.absmax must be torch.uint8"),
    "half": (changed("gate_up_proj.scale_absmax", lambda t: t.half()), "gate_up_proj.scale_absmax must be"),
    "offset": (changed("gate_up_proj.scale_offset", lambda t: t[0]), r"gate_up_proj.scale_offset must be .* \[5\]"),
    "missing": (lambda state: state.pop("down_proj.code"), "down_proj.code"),
    "unexpected": (lambda state: state.update(extra=torch.zeros(1)), "extra"),
    "codebook": (Layout(codebook="af4"), "gate_up_proj.code must be the nf4 codebook"),
    "block-size": (Layout(32), "gate_up_proj.absmax must be"),
    "no-double-quant": (Layout(scale_codebook=None), "gate_up_proj.absmax must be torch.uint8"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED_STATES.values(), ids=REFUSED_STATES)
def test_a_state_that_does_not_fit_is_refused(source, message):
    experts = QuantExperts.from_experts(fused())
    if isinstance(source, Layout):
        state = QuantExperts.from_experts(fused(), **source.options).state_dict()
    else:
        state = experts.state_dict()
        source(state)
    with pytest.raises(RuntimeError, match=message):
        experts.load_state_dict(state)


def test_a_scale_cast_behind_its_back_is_an_error():
    for name in ("scale_absmax", "scale_offset", "code", "scale_code"):
        experts = QuantExperts.from_experts(fused())
        setattr(experts.down_proj, name, getattr(experts.down_proj, name).bfloat16())
        with pytest.raises(TypeError, match=f"nf4kernels.QuantExperts: {name} must stay float32, got torch.bfloat16"):
            experts(X, INDEX, WEIGHTS)


def test_meta_forward_gives_shapes():
    experts = QuantExperts.from_experts(fused()).to("meta")
    x = X.to("meta").requires_grad_()
    y = experts(x, INDEX.to("meta"), WEIGHTS.to("meta"))
    assert y.is_meta
    assert y.shape == (6, H)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_to_experts(dtype):
    module = fused()
    experts = QuantExperts.from_experts(module)
    dense = experts.to_experts(dtype)
    for name in PARTS:
        weight = getattr(dense, name)
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        each = [nf4.dequantize(q, dtype) for q in quantize_experts(getattr(module, name))]
        assert torch.equal(weight, torch.stack(each))
        assert getattr(experts, name).dequantize(dtype).data_ptr() != weight.data_ptr()
    assert dense.config is module.config
    assert dense is not module
    assert module.gate_up_proj is not None, "the module it was made from is as it was"
    back = experts.to_experts(torch.float32, [getattr(module, name) for name in PARTS])
    for name in PARTS:
        assert torch.equal(getattr(back, name), getattr(module, name))
        assert getattr(back, name).data_ptr() != getattr(module, name).data_ptr()
    made = QuantExperts(experts.gate_up_proj.qweight, experts.down_proj.qweight, silu)
    assert torch.equal(made(X, INDEX, WEIGHTS), experts(X, INDEX, WEIGHTS))
    with pytest.raises(ValueError, match="to_experts: the module must be from from_experts"):
        made.to_experts()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_for_any_number_of_tokens(fresh_dynamo, backend):
    experts = QuantExperts.from_experts(fused())
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    for tokens in (6, 17, 40):
        x, index, weights = routed(tokens, seed=tokens)
        gradients = []
        for module in (experts, compiled):
            leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
            for tensor in (*leaves, index):
                torch._dynamo.mark_dynamic(tensor, 0)
            y = module(leaves[0], index, leaves[1])
            y.square().sum().backward()
            gradients.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for eager, traced in zip(*gradients):
            torch.testing.assert_close(traced, eager, rtol=0, atol=2**-18 * eager.abs().max().item())
    assert counter.frame_count == 1


def test_prints_what_it_is():
    text = str(QuantExperts.from_experts(fused(), codebook="fp4"))
    for part in ("num_experts=5", "in_features=128", "out_features=384", "codebook=fp4", "down_proj", "act_fn"):
        assert part in text
