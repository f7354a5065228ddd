"""QuantLinear: a drop-in nn.Linear, whatever is done to it and in whichever order."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from support import cases
from support.cases import DTYPES, LAYOUTS, Layout, dtype_id
from torch import nn

from nf4kernels import LoraConfig, QuantLinear, dequantize, linear, quantize
from nf4kernels.nn.quant_module import SCALE_TENSORS

LORA = LoraConfig(r=4, alpha=8)
STATE = (*SCALE_TENSORS, "source_dtype", "checksum")


def make(K=100, N=37, lora=LORA, bias=True, dtype=torch.float32, layout=Layout(), **options):  # noqa: B008
    layer = QuantLinear(K, N, bias, lora=lora, dtype=dtype, **layout.options, **options)
    if lora is not None:
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return layer


def weight_tensors(layer):
    return {"weight": layer.weight, **{name: getattr(layer, name) for name in STATE}}


def assert_same_weight(a, b):
    for (name, left), right in zip(weight_tensors(a).items(), weight_tensors(b).values()):
        if left is None:
            assert right is None, name
        else:
            assert left.dtype == right.dtype, name
            assert torch.equal(left, right), name


def expected_output(layer, x):
    """The dense layer in fp64."""
    w = layer.dequantize(torch.float32).double()
    if layer.lora is not None:
        w = w + layer.lora.scaling * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    y = x.double() @ w.T
    return y if layer.bias is None else y + layer.bias.double()


def assert_works(layer, dtype=torch.float32):
    """Forward in both modes and a backward, against the dense layer."""
    for mode in (False, True, False):
        layer.train(mode)
        x = torch.randn(5, layer.in_features, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.dtype == dtype
        exact = expected_output(layer, x)
        # 8 roundings to the dtype of terms that are at most sqrt(K) times the result's size, in norm.
        allowed = 8 * torch.finfo(dtype).eps * exact.norm() * layer.in_features**0.5
        assert (y.double() - exact).norm() <= allowed
        y.sum().backward()
        assert x.grad.isfinite().all()
        assert x.grad.count_nonzero() > 0


def test_is_an_nn_linear():
    layer = QuantLinear(100, 37)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (100, 37)
    assert layer.weight.dtype == torch.uint8
    assert not layer.weight.requires_grad
    assert type(layer.weight) is nn.Parameter
    assert layer.bias.requires_grad
    assert QuantLinear(100, 37, bias=False).bias is None
    assert list(layer.state_dict()) == ["weight", "absmax", "bias", *SCALE_TENSORS[1:], "source_dtype", "checksum"]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS[:4] + LAYOUTS[-3:], ids=str)
def test_from_linear(layout, dtype):
    dense = nn.Linear(100, 37, dtype=dtype).eval()
    layer = QuantLinear.from_linear(dense, **layout.options)
    qweight = quantize(dense.weight, **layout.options)
    assert torch.equal(layer.weight, qweight.packed)
    assert layer.bias is dense.bias
    assert not layer.training
    assert layer.qweight.dtype == dtype
    x = torch.randn(5, 100, dtype=dtype)
    assert torch.equal(layer(x), linear(x, qweight, dense.bias))
    assert torch.equal(layer.dequantize(dtype), dequantize(qweight, dtype))


def test_fresh_layer_starts_as_nn_linear_does():
    torch.manual_seed(3)
    layer = QuantLinear(256, 64, dtype=torch.float32)
    torch.manual_seed(3)
    dense = nn.Linear(256, 64)
    assert torch.equal(layer.bias, dense.bias)
    assert torch.equal(layer.weight, quantize(dense.weight).packed)
    torch.manual_seed(4)
    layer.reset_parameters()
    torch.manual_seed(4)
    dense.reset_parameters()
    assert torch.equal(layer.weight, quantize(dense.weight).packed)
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reset_parameters_keeps_the_layout(layout):
    layer = make(layout=layout)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert layer.qweight.block_size == layout.block_size
    assert_works(layer)


@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("K", [128, 100, 63])
def test_every_order_of_life(isa, lora, bias, K):
    """What breaks the incumbent: eval before train, saving after a forward, merging after eval, going on after it."""
    layer = make(K, 33, lora, bias)
    frozen = {name: t.clone() for name, t in weight_tensors(layer).items() if t is not None}
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(1, K))
        layer(torch.randn(0, K))
    assert_works(layer)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    merged = layer.to_linear(torch.float32)
    x = torch.randn(4, K)
    torch.testing.assert_close(merged(x).double(), expected_output(layer, x), rtol=2**-18, atol=2**-16)
    assert_works(layer)
    for name, tensor in frozen.items():
        assert torch.equal(getattr(layer, name), tensor), f"{name} was repacked"
    other = make(K, 33, lora, bias)
    other.eval()(x)
    assert other.load_state_dict(state, strict=True).missing_keys == []
    assert_same_weight(other, layer)
    assert torch.equal(other(x), layer(x))
    assert_works(other)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(layout, assign):
    layer = make(layout=layout)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make(layout=layout)
    result = other.load_state_dict(torch.load(buffer, weights_only=True), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_weight(other, layer)
    x = torch.randn(5, 100)
    assert torch.equal(other(x), layer(x))
    assert_works(other)


@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_meta_then_assign(lora):
    layer = make(lora=lora)
    with torch.device("meta"):
        empty = QuantLinear(100, 37, lora=lora, dtype=torch.float32)
    for tensor in (*empty.parameters(), *empty.buffers()):
        assert tensor.is_meta
    with pytest.raises(ValueError, match="meta"):
        empty.qweight  # noqa: B018
    empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
    x = torch.randn(5, 100)
    assert torch.equal(empty(x), layer(x))
    assert not empty.weight.requires_grad
    assert_works(empty)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LORA, LoraConfig(r=4, dropout=0.5)], ids=["plain", "lora", "dropout"])
def test_meta_forward_and_backward_give_shapes(lora, compute_dtype):
    """A whole model is often run on meta to learn its shapes and sizes."""
    layer = QuantLinear(100, 37, lora=lora, compute_dtype=compute_dtype, dtype=torch.float32, device="meta")
    x = torch.empty(2, 5, 100, device="meta", requires_grad=True)
    y = layer(x)
    assert y.is_meta
    assert (y.shape, y.dtype) == ((2, 5, 37), torch.float32)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.bias.grad.shape == (37,)


def test_meta_then_to_empty_and_load():
    layer = make()
    empty = QuantLinear(100, 37, lora=LORA, dtype=torch.float32, device="meta")
    empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), strict=True)
    assert_same_weight(empty, layer)
    assert_works(empty)


def test_a_buffer_left_on_meta_is_an_error():
    layer = make(lora=None)
    for name in SCALE_TENSORS:
        broken = copy.deepcopy(layer)
        setattr(broken, name, getattr(broken, name).to("meta"))
        with pytest.raises((RuntimeError, ValueError), match="device"):
            broken(torch.randn(5, 100))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_copies_are_separate(duplicate, lora):
    layer = make(lora=lora).eval()
    layer(torch.randn(2, 100))
    copied = duplicate(layer)
    assert_same_weight(copied, layer)
    assert copied.lora == layer.lora
    assert copied.training == layer.training
    for a, b in zip((*layer.parameters(), *layer.buffers()), (*copied.parameters(), *copied.buffers())):
        assert a.data_ptr() != b.data_ptr()
    x = torch.randn(5, 100)
    assert torch.equal(copied(x), layer(x))
    assert_works(copied)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double-and-back": lambda m: m.double().float(),
    "to-dtype": lambda m: m.to(torch.float16),
    "to-device-and-dtype": lambda m: m.to("cpu", torch.bfloat16),
    "to-like": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda m: m.type(torch.bfloat16),
    "in-a-model": lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    "apply": lambda m: m.apply(lambda n: n.to(torch.float16)),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("layout", [Layout(), Layout(scale_codebook=None)], ids=str)
def test_casts_leave_the_weight_alone(cast, layout):
    layer = make(layout=layout)
    before = copy.deepcopy(layer)
    layer = cast(layer)
    assert_same_weight(layer, before)
    assert layer.bias.dtype == layer.lora_A.weight.dtype == layer.lora_B.weight.dtype
    assert layer.qweight.dtype == torch.float32, "what it was quantized from does not change"
    assert torch.equal(layer.dequantize(torch.float32), before.dequantize(torch.float32))
    for dtype in DTYPES:
        assert layer(torch.randn(2, 100, dtype=dtype)).dtype == dtype


def test_a_scale_cast_behind_its_back_is_an_error():
    for name in ("scale_absmax", "scale_offset", "code", "scale_code"):
        layer = make()
        setattr(layer, name, getattr(layer, name).bfloat16())
        with pytest.raises(TypeError, match=f"{name} must stay float32, got torch.bfloat16"):
            layer(torch.randn(2, 100))
    layer = make()
    layer.absmax = layer.absmax.float()
    with pytest.raises(TypeError, match=r"absmax must stay torch.uint8, got torch.float32"):
        layer(torch.randn(2, 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("compute_dtype", [None, *DTYPES])
def test_compute_dtype(dtype, compute_dtype):
    layer = make(compute_dtype=compute_dtype)
    x = torch.randn(5, 100, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    if compute_dtype is not None:
        plain = make(lora=LORA)
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(y, plain(x.to(compute_dtype)).to(dtype))
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert layer.lora_A.weight.grad.dtype == torch.float32


def test_autocast_wins_over_compute_dtype():
    layer = make(compute_dtype=torch.float32)
    dense = nn.Linear(100, 37)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert layer(torch.randn(5, 100)).dtype == dense(torch.randn(5, 100)).dtype == dtype


def test_trains_the_adapter_only():
    layer = make()
    layer.bias.requires_grad_(False)
    frozen = copy.deepcopy(layer)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    x, target = torch.randn(16, 100), torch.randn(16, 37)
    losses = []
    for _ in range(5):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert_same_weight(layer, frozen)
    assert torch.equal(layer.bias, frozen.bias)
    assert not torch.equal(layer.lora_A.weight, frozen.lora_A.weight)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_turned_into_a_plain_attribute(name):
    """As nn.DataParallel's replicas and FSDP1 hold theirs: forward must find it there."""
    layer = make()
    x = torch.randn(5, 100)
    expected = layer(x)
    tensor = getattr(layer, name).data
    delattr(layer, name)
    layer.__dict__[name] = tensor
    assert torch.equal(layer(x), expected)


def test_requires_grad_of_the_whole_module():
    """requires_grad_(True) over a model meets an integer parameter: torch's own error, and freezing works."""
    layer = make()
    layer.requires_grad_(False)
    assert not layer(torch.randn(2, 100)).requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        layer.weight.requires_grad_(True)


def test_dropout_in_training_only():
    layer = make(lora=LoraConfig(r=4, dropout=0.5))
    x = torch.randn(5, 100)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_to_linear():
    layer = make()
    plain = layer.to_linear(torch.float32, merge_lora=False)
    assert torch.equal(plain.weight, layer.dequantize(torch.float32))
    assert layer.to_linear().weight.dtype == torch.float32, "what the layer was"
    merged = layer.eval().to_linear(torch.bfloat16)
    assert type(merged) is nn.Linear
    assert merged.weight.dtype == merged.bias.dtype == torch.bfloat16
    assert merged.weight.requires_grad
    assert not merged.training
    exact = layer.dequantize(torch.float32) + layer.lora_delta()
    assert torch.equal(merged.weight, exact.bfloat16()), "summed in fp32, rounded once"
    merged.bias.data.zero_()
    assert layer.bias.count_nonzero() > 0


def test_another_weight_of_another_shape_is_refused():
    layer = QuantLinear(64, 96)
    with pytest.raises(ValueError, match=r"to_linear: base_weight must be \[96, 64\], got \[3, 3\]"):
        layer.to_linear(base_weight=torch.zeros(3, 3))


def test_a_layer_on_meta_without_bias_wants_the_adapters_dtype():
    layer = QuantLinear(64, 96, bias=False, device="meta")
    with pytest.raises(ValueError, match=r"the layer is on the meta device .* give a dtype, or load its state first"):
        layer.add_lora(LoraConfig(r=2))
    layer.add_lora(LoraConfig(r=2), dtype=torch.bfloat16)
    assert layer.lora_A.weight.dtype == torch.bfloat16


def test_second_adapter_is_refused():
    layer = make()
    before = layer.lora_A
    with pytest.raises(ValueError, match="must have no adapter 'default' yet"):
        layer.add_lora(LORA)
    assert layer.lora_A is before
    with pytest.raises(ValueError, match="must have an adapter"):
        make(lora=None).lora_delta()


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_adapter_dtype(dtype):
    for bias in (True, False):
        layer = QuantLinear(100, 37, bias=bias, dtype=torch.float16)
        layer.add_lora(LORA, dtype)
        assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == (dtype or torch.float16)


def test_works_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for K in (128, 100, 63):
            assert_works(make(K))


def test_prints_what_it_is():
    text = str(make(layout=Layout(128, "fp4", None)))
    for part in ("in_features=100", "out_features=37", "codebook=fp4", "block_size=128", "lora_r=4"):
        assert part in text
    assert cases.ISAS[0] not in text
