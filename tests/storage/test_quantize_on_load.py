"""load_checkpoint(quantize=True): a dense checkpoint into a model in 4 bits, with the bits of quantize_model."""

import pytest
import torch
from safetensors.torch import save_file
from support import tiny
from support.unchanged import assert_unchanged, snapshot
from torch import nn

import nf4kernels as nf4
from nf4kernels.storage import file_parts, sharded_load

OPTIONS = (
    {}, {"codebook": "af4", "block_size": 32, "double_quant": False}, {"scale_codebook": "dynamic8"},
    {"codebook": "mxfp4"}, {"codebook": "nvfp4"}, {"codebook": "int4_symmetric"},
)  # fmt: skip


class Net(nn.Module):
    """A matrix whose blocks straddle rows, a bias, a layer under two names, and two tied tensors."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 96)
        self.odd = nn.Linear(96, 33, bias=False)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight
        self.up_again = self.up


def dense(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def write(model: nn.Module, path) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "again" not in name}
    save_file(tensors, path)
    return tensors


def assert_same_state(got, expected):
    state, theirs = got.state_dict(), expected.state_dict()
    assert list(state) == list(theirs)
    for name, tensor in theirs.items():
        assert state[name].dtype == tensor.dtype, name
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bits_are_those_of_quantize_model(options, device, tmp_path):
    expected, options = dense(), {"block_size": 32, **options} if options.get("codebook") != "nvfp4" else options
    write(expected, tmp_path / "a.safetensors")
    with torch.device(device):
        model = dense(1)
        nf4.quantize_model(model, progress=False, **options)
    nf4.quantize_model(expected, progress=False, **options)
    nf4.load_checkpoint(model, tmp_path / "a.safetensors", quantize=True)
    assert_same_state(model, expected)
    x = torch.randn(3, 64)
    assert torch.equal(model.up_again(x), expected.up(x))
    assert model.lm_head.weight is model.embed.weight


def test_experts_from_a_matrix_for_each(tmp_path):
    expected = tiny.make("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    expected.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = tiny.make("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
        nf4.quantize_model(model, lora=nf4.LoraConfig(r=2), progress=False)
    nf4.quantize_model(expected, progress=False)
    with pytest.warns(UserWarning, match="still on the meta device"):
        nf4.load_checkpoint(model, tmp_path, quantize=True)
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    factors = {name: tensor for name, tensor in state.items() if "lora_" in name}
    assert factors
    for name, tensor in factors.items():
        assert tensor.any() == ("lora_A" in name), name


def test_a_dense_file_is_not_quantized_unasked(tmp_path):
    write(dense(), tmp_path / "a.safetensors")
    model = dense()
    nf4.quantize_model(model, progress=False)
    with pytest.raises(ValueError, match=r"a 4-bit weight up.weight, got none \(a dense one: quantize=True"):
        nf4.load_checkpoint(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("wrong", ["shape", "dtype", "missing", "tied", "cut", "4 bits", "pissa"])
def test_what_does_not_fit_changes_nothing(wrong, tmp_path):
    tensors, path = write(dense(), tmp_path / "a.safetensors"), tmp_path / "a.safetensors"
    model = dense(1)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=2, init="pissa" if wrong == "pissa" else "default"), progress=False)
    before = snapshot(model)
    if wrong == "shape":
        tensors["up.weight"] = torch.zeros(64, 96)
    elif wrong == "dtype":
        tensors["up.weight"] = torch.zeros(96, 64, dtype=torch.int32)
    elif wrong == "missing":
        del tensors["odd.weight"]
    elif wrong == "tied":
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    if wrong == "4 bits":
        other = dense()
        nf4.quantize_model(other, codebook="int4", progress=False)
        nf4.save_checkpoint(other, path)
    else:
        save_file(tensors, path)
    if wrong == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    says = {
        "shape": r"up.weight must be floating point \[96, 64\], got torch.float32 \[64, 96\]",
        "dtype": "up.weight must be floating point", "missing": "must have a 4-bit weight odd.weight, got none",
        "tied": "embed.weight and lm_head.weight are tied", "cut": "must be a whole safetensors file",
        "4 bits": "must have codebook nf4 as the model's layer, got int4", "pissa": "must have the adapter of up",
    }[wrong]  # fmt: skip
    with pytest.raises(ValueError, match=says):
        nf4.load_checkpoint(model, path, quantize=True)
    assert_unchanged(model, before)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    tensors = write(dense(), tmp_path / "a.safetensors")
    tensors["up.weight"][5, 7] = torch.inf
    save_file(tensors, tmp_path / "a.safetensors")
    model = dense()
    nf4.quantize_model(model, progress=False)
    with pytest.raises(ValueError, match=r"load_checkpoint: up.weight: .*got inf at row 5, column 7"):
        nf4.load_checkpoint(model, tmp_path / "a.safetensors", quantize=True)


def test_of_some_experts_the_others_are_not_looked_at(tmp_path, monkeypatch):
    """What a rank reads that holds a part of the experts; the file has a matrix for each."""
    model = tiny.make("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    expected = model.model.layers[1].mlp.experts
    nf4.quantize_model(model, progress=False)
    plan = sharded_load._planned(model, tmp_path, True, "who")
    seen, views = [], file_parts.views
    monkeypatch.setattr(file_parts, "views", lambda stored, who: seen.extend(stored) or views(stored, who))
    for leaf in ("gate_up_proj", "down_proj"):
        weight = getattr(expected, leaf)
        source = plan.dense[f"model.layers.1.mlp.experts.{leaf}"]
        part = (slice(1, 3), slice(0, weight.shape[1]), slice(0, weight.shape[2]))
        assert torch.equal(source.read(model, part, "who"), weight[1:3])
    assert {each.name.split(".experts.")[1].split(".")[0] for each in seen} == {"1", "2"}
