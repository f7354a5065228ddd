"""Packed bytes written in place are noticed; averages of equal bytes, copies, swaps and loading still work."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nf4kernels as nf4
from nf4kernels.nn.checksum import checksum

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
BUFFERS = ("absmax", "scale_absmax", "scale_offset", "code", "scale_code", "source_dtype")
CHANGED = "must stay as quantize made them, got bytes that were changed in place .* codes, not numbers"


@pytest.fixture
def layer():
    return nf4.QuantLinear(64, 64, dtype=torch.float32)


def averaged(model, **options):
    copy_ = AveragedModel(model, **options)
    for _ in range(20):
        copy_.update_parameters(model)
    return copy_


def bytes_of(layer):
    return [t.clone() for t in (layer.weight.data, layer.absmax, layer.scale_absmax)]


# What must be refused


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_ema_of_packed_bytes_is_refused(layer, use_buffers):
    """the EMA model of a QLoRA run talks nonsense though nothing was trained."""
    ema = averaged(nn.Sequential(layer), multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=use_buffers)
    with pytest.raises(RuntimeError, match=CHANGED):
        ema(X)


WRITES = {
    "nn.init.zeros_": lambda layer: nn.init.zeros_(layer.weight),
    "nn.init.constant_": lambda layer: nn.init.constant_(layer.weight, 3),
    "detach().zero_": lambda layer: layer.weight.detach().zero_(),
    "copy_": lambda layer: layer.weight.copy_(layer.weight.flip(0)),
    "item": lambda layer: layer.weight.__setitem__(0, 7),
    "clamp_": lambda layer: layer.weight.clamp_(0, 100),
    "absmax.zero_": lambda layer: layer.absmax.zero_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_bytes_written_in_place_are_refused(layer, write):
    """a model's _init_weights, or a clean-up of weights, ran over a 4-bit weight."""
    layer(X)
    with torch.no_grad():
        WRITES[write](layer)
    with pytest.raises(RuntimeError, match=CHANGED):
        layer(X)


@pytest.mark.parametrize("use", ["dequantize", "to_linear", "qweight", "state_dict_to_file"])
def test_no_other_door_hands_out_changed_bytes(layer, use, tmp_path):
    """garbage that is merged or saved before anyone runs a forward."""
    nn.init.zeros_(layer.weight)
    uses = {
        "dequantize": layer.dequantize,
        "to_linear": layer.to_linear,
        "qweight": lambda: layer.qweight,
        "state_dict_to_file": lambda: nf4.save_checkpoint(nn.Sequential(layer), tmp_path / "a"),
    }
    with pytest.raises((RuntimeError, ValueError), match=CHANGED):
        uses[use]()


PRUNING = {
    "l1_unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "random_structured": lambda layer: prune.random_structured(layer, "weight", 0.5, dim=0),
    "custom_from_mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.zeros_like(layer.weight)),
    "global_unstructured": lambda layer: prune.global_unstructured(
        [(layer, "weight")], pruning_method=prune.L1Unstructured, amount=0.5
    ),
}


@pytest.mark.parametrize("how", PRUNING)
def test_pruned_bytes_are_refused(layer, how):
    """A byte of zeros is two weights of minus one, not none."""
    PRUNING[how](layer)
    for use in (lambda: layer(X), layer.dequantize):
        with pytest.raises(RuntimeError, match="must be the packed bytes themselves, got what pruning or another"):
            use()
    prune.remove(layer, "weight")
    with pytest.raises(RuntimeError, match=CHANGED):
        layer(X)


def test_a_parametrization_of_packed_bytes_is_refused(layer):
    """weight_norm, orthogonal, masks; without it the layer is what it was."""

    class Half(nn.Module):
        def forward(self, weight):
            return weight // 2

    expected = layer(X)
    parametrize.register_parametrization(layer, "weight", Half())
    with pytest.raises(RuntimeError, match="must be the packed bytes themselves"):
        layer(X)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.equal(layer(X), expected)
    parametrize.register_parametrization(layer, "weight", Half())
    parametrize.remove_parametrizations(layer, "weight")
    with pytest.raises(RuntimeError, match=CHANGED):
        layer(X)


def test_an_average_of_two_state_dicts_is_refused():
    """A model soup of two bases, cast back to the dtypes of the first: codebooks and scales average plausibly."""
    a, b = (nf4.QuantLinear(64, 64, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        soup = {key: ((va + b.state_dict()[key]) / 2).to(va.dtype) for key, va in a.state_dict().items()}
    before = a(X)
    with pytest.raises(RuntimeError, match=r"weight must hold the bytes that checksum is of, got others \(an average"):
        a.load_state_dict(soup)
    assert torch.equal(a(X), before)


def test_a_soup_of_one_base_that_overflows_is_refused(layer):
    """The same of two fine-tunes of one base: uint8 + uint8 wraps before it is halved."""
    state = layer.state_dict()
    soup = {key: ((value + value) / 2).to(value.dtype) for key, value in state.items()}
    assert not torch.equal(soup["weight"], state["weight"])
    with pytest.raises(RuntimeError, match="average adapters alone"):
        layer.load_state_dict(soup)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_counts_its_versions_anew(layer, how):
    """Written into until its versions are those that the original's were right at."""
    for _ in range(3):
        layer.load_state_dict(layer.state_dict())
    layer(X)
    copied = COPIES[how](layer)
    right, versions = (lambda m=m: m.weight._version + m.absmax._version for m in (layer, copied))
    while versions() < right():
        nn.init.zeros_(copied.weight)
    assert versions() == right() == layer._seen
    with pytest.raises(RuntimeError, match=CHANGED):
        copied(X)


def test_a_refusal_stays_until_the_bytes_are_back(layer):
    state = copy.deepcopy(layer.state_dict())
    expected = layer(X)
    nn.init.zeros_(layer.weight)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=CHANGED):
            layer(X)
    layer.load_state_dict(state)
    assert torch.equal(layer(X), expected)


def test_experts_bytes_written_in_place_are_refused(tmp_path):
    """the same in a mixture of experts."""
    weight = nf4.quantize_experts(torch.randn(2, 128, 64))
    down = nf4.quantize_experts(torch.randn(2, 64, 64))
    experts = nf4.QuantExperts(weight, down, nn.functional.silu)
    nn.init.zeros_(experts.down_proj.weight)
    with pytest.raises(RuntimeError, match=CHANGED):
        experts(X, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    with pytest.raises(RuntimeError, match=CHANGED):
        nf4.save_checkpoint(nn.Sequential(experts), tmp_path / "a")


# What must still work (right today)


def test_an_average_by_mean_keeps_the_bytes(layer):
    """Kept right: AveragedModel's default, the running mean of equal bytes."""
    model = nn.Sequential(layer)
    swa = averaged(model)
    assert torch.equal(swa(X), model(X))


def test_a_float_mean_of_two_states_of_one_base_keeps_the_bytes(layer):
    """Kept right: a soup of adapters over one base, averaged in floating point."""
    layer.add_lora(nf4.LoraConfig(r=4))
    state = layer.state_dict()
    soup = {key: torch.stack([v.float(), v.float()]).mean(0).to(v.dtype) for key, v in state.items()}
    before = layer(X)
    layer.load_state_dict(soup)
    assert torch.equal(layer(X), before)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "half": lambda layer: copy.deepcopy(layer).half().float(),
    "to_empty then load": lambda layer: reloaded(layer),
    "requires_grad_": lambda layer: layer.requires_grad_(False),
    "share_memory": lambda layer: layer.share_memory(),
}


def reloaded(layer):
    state = copy.deepcopy(layer.state_dict())
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("how", COPIES)
def test_copies_and_casts_are_not_changes(layer, how):
    """Kept right: nothing of this writes into packed bytes as numbers."""
    before = layer.dequantize()
    layer(X)
    copied = COPIES[how](layer)
    copied(X)
    assert torch.equal(copied.dequantize(), before)


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_may_be_loaded(layer, assign):
    """Kept right: load_state_dict of another model's bytes, in place or assigned, twice."""
    layer(X)
    for _ in range(2):
        other = nf4.QuantLinear(64, 64, dtype=torch.float32)
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(layer(X), other(X))


def test_functional_and_exchanged_weights_work(layer):
    """Kept right: functional_call with another layer's state, parameters exchanged as objects, and set_qweight."""
    other = nf4.QuantLinear(64, 64, dtype=torch.float32)
    expected = other(X)
    assert torch.equal(torch.func.functional_call(layer, dict(other.state_dict()), (X,)), expected)
    for name in ("weight", "bias", *BUFFERS):
        setattr(layer, name, getattr(other, name))
    assert torch.equal(layer(X), expected)
    third = nf4.QuantLinear(64, 64, bias=False, dtype=torch.float32)
    layer.set_qweight(third.qweight)
    assert torch.equal(layer.dequantize(), third.dequantize())


def test_an_ema_of_adapters_alone_works(layer):
    """The documented way: average what requires a gradient, leave bytes alone."""
    layer.add_lora(nf4.LoraConfig(r=4))
    ema = {name: p.detach().clone() for name, p in layer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ema:
                ema[name].lerp_(parameter, 0.1)
    layer.load_state_dict(ema, strict=False)
    layer(X)


def test_a_broadcast_of_all_state_is_not_a_change(layer):
    """Kept right: what DDP does at its start where ranks differ: parameters and buffers written in place, together."""
    other = nf4.QuantLinear(64, 64, dtype=torch.float32)
    layer(X)
    with torch.no_grad():
        for module_tensors in ("parameters", "buffers"):
            for mine, theirs in zip(getattr(layer, module_tensors)(), getattr(other, module_tensors)()):
                mine.detach().copy_(theirs)
    assert torch.equal(layer(X), other(X))


@pytest.mark.parametrize("part", ["all", "weight"])
def test_a_state_of_an_earlier_version_loads(layer, part):
    """It has no checksum; so has one that holds the weight alone."""
    other = nf4.QuantLinear(64, 64, dtype=torch.float32)
    state = {key: value for key, value in other.state_dict().items() if key != "checksum"}
    if part == "weight":
        state = {"weight": state["weight"]}
    result = layer.load_state_dict(state, strict=part == "all")
    assert "checksum" not in result.missing_keys
    layer.weight.add_(0)  # a new version: the checksum is asked
    layer(X)
    assert torch.equal(layer.weight, other.weight)


def test_experts_of_a_file_are_right(tmp_path):
    """load_checkpoint writes into experts in place, or puts others into their place on meta."""
    source, target = (
        nn.Sequential(
            nf4.QuantExperts(
                nf4.quantize_experts(torch.randn(2, 128, 64)), nf4.quantize_experts(torch.randn(2, 64, 64)), nn.SiLU()
            )
        )
        for _ in range(2)
    )
    arguments = X, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    nf4.save_checkpoint(source, tmp_path / "a")
    for model in (target, copy.deepcopy(target).to("meta")):
        nf4.load_checkpoint(model, tmp_path / "a")
        loaded = copy.deepcopy(model)  # compared at the next use
        assert torch.equal(loaded[0](*arguments), source[0](*arguments))


def test_tensors_of_inference_mode_are_used(layer):
    """They have no version, and nothing is compared."""
    expected = layer(X)
    with torch.inference_mode():
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
    assert layer.weight.is_inference()
    with torch.no_grad():
        assert torch.equal(layer(X), expected)


# The checksum


@pytest.mark.parametrize("size", [1, 7, 8, 2047, 2048, 2049, 10_000])
def test_any_changed_byte_shows(size):
    generator = torch.Generator().manual_seed(size)
    packed = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    absmax = torch.tensor([3, 200, 77], dtype=torch.uint8)
    right = checksum(packed, absmax)
    assert (right.shape, right.dtype) == ((8,), torch.uint8)
    for place in {0, size // 2, size - 1}:
        for bit in range(8):
            other = packed.clone()
            other[place] ^= 1 << bit
            assert not torch.equal(checksum(other, absmax), right)
    assert not torch.equal(checksum(packed, absmax.flip(0)), right)
    scales = absmax.float()  # numbers, which may be changed as such
    assert torch.equal(checksum(packed, scales), checksum(packed, scales + 1))
    unaligned = torch.cat([packed[:1], packed])[1:]
    assert torch.equal(checksum(unaligned, absmax), right)


def test_exchanged_rows_and_columns_show():
    packed, absmax = torch.randint(0, 256, (16, 2048), dtype=torch.uint8), torch.zeros(1)
    right = checksum(packed, absmax)
    for rows in ([1, 0, *range(2, 16)], list(range(15, -1, -1))):
        assert not torch.equal(checksum(packed[rows], absmax), right)
    columns = packed.view(16, 256, 8)[:, [1, 0, *range(2, 256)]].reshape(16, 2048)
    assert not torch.equal(checksum(columns, absmax), right)


def test_an_empty_weight_has_a_checksum():
    assert not checksum(torch.empty(0, 32, dtype=torch.uint8), torch.empty(0, 1, dtype=torch.uint8)).any()
