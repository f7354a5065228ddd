"""Checkpoints of whole models: they read back, and damaged files change nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.stored_weights import assert_same_weight, quantized
from support.unchanged import assert_unchanged, snapshot
from torch import nn

import nf4kernels as nf4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.register_buffer("steps", torch.tensor(3))
        self.lm_head.weight = self.embed.weight
        self.up_again = self.up


def assert_same_state(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.fixture
def net():
    model = Net()
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4, alpha=3, use_rslora=True), progress=False)
    with torch.no_grad():
        model.up.lora_B.weight.normal_()
    return model


@pytest.mark.parametrize("start", ["dense", "meta", "quantized", "other options"])
def test_model_reads_back(start, net, tmp_path):
    nf4.save_checkpoint(net, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]
    with torch.device("meta" if start == "meta" else "cpu"):
        model = Net().eval()
    if start == "quantized":
        nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), progress=False)
    elif start == "other options":
        nf4.quantize_model(model, codebook="af4", block_size=32, double_quant=False, progress=False)
    nf4.load_checkpoint(model, tmp_path / "a.safetensors")
    assert_same_state(model.state_dict(), net.state_dict())
    assert model.lm_head.weight is model.embed.weight
    assert model.up_again is model.up
    assert model.up.lora.r == 4
    if start != "quantized":
        assert model.up.lora == net.up.lora
    assert not model.up.training
    assert model.up.codebook == "nf4"
    x = torch.randn(3, 64)
    if start != "quantized":
        assert torch.equal(model.up(x), net.up(x))


def test_file_holds_bitsandbytes_names_and_nothing_twice(net, tmp_path):
    nf4.save_checkpoint(net, tmp_path / "a.safetensors")
    names = set(load_file(tmp_path / "a.safetensors"))
    parts = ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"]
    expected = {f"{layer}.weight{part}" for layer in ("up", "down") for part in parts}
    expected |= {f"{layer}.lora_{factor}.weight" for layer in ("up", "down") for factor in "AB"}
    assert names == expected | {"embed.weight", "up.bias", "steps"}
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_single_layer_reads_back(tmp_path):
    layer = nf4.QuantLinear(65, 33, lora=nf4.LoraConfig(r=2))
    nf4.save_checkpoint(layer, tmp_path / "a.safetensors")
    other = nf4.QuantLinear(65, 33)
    nf4.load_checkpoint(other, str(tmp_path / "a.safetensors"))
    assert_same_state(other.state_dict(), layer.state_dict())


def test_saving_over_the_file_a_model_was_loaded_from(net, tmp_path):
    nf4.save_checkpoint(net, tmp_path / "a.safetensors")
    model = Net()
    nf4.load_checkpoint(model, tmp_path / "a.safetensors")
    nf4.save_checkpoint(model, tmp_path / "a.safetensors")
    again = Net()
    nf4.load_checkpoint(again, tmp_path / "a.safetensors")
    assert_same_state(again.state_dict(), net.state_dict())


def test_custom_scale_map_reads_back(tmp_path):
    qweight = quantized(torch.randn(8, 64), scale="dynamic8")
    tensors = nf4.weight_to_tensors(qweight)
    tensors["weight.nested_quant_map"] = tensors["weight.nested_quant_map"] * 0.5
    found = nf4.weight_from_tensors(tensors)
    assert found.scale_codebook == "custom"
    model = nn.ModuleDict({"fc": nf4.QuantLinear.from_quantized(found)})
    nf4.save_checkpoint(model, tmp_path / "a.safetensors")
    other = nn.ModuleDict({"fc": nn.Linear(64, 8, bias=False)})
    nf4.load_checkpoint(other, tmp_path / "a.safetensors")
    assert_same_weight(other["fc"].qweight, found)


def sharded(tensors, directory: Path):
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )


def test_sharded_directory_loads_even_when_a_weight_is_split(tmp_path):
    net = Net()
    nf4.quantize_model(net, progress=False)
    nf4.save_checkpoint(net, tmp_path / "a.safetensors")
    sharded(load_file(tmp_path / "a.safetensors"), tmp_path)
    model = Net()
    nf4.load_checkpoint(model, tmp_path)
    assert_same_state(model.state_dict(), net.state_dict())


def edited(change):
    def write(directory, file):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return write


def cut(directory, file):
    file.write_bytes(file.read_bytes()[:-100])


def header(directory, file):
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def index_without_file(directory, file):
    sharded(load_file(file), directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    return directory


def index_damaged(directory, file):
    (directory / "model.safetensors.index.json").write_text('{"weight_map": 3', encoding="utf-8")
    return directory


def metadata_damaged(directory, file):
    save_file(load_file(file), file, {"nf4kernels.lora": '{"up": {"r": 0}}'})


BAD_FILES = {
    "cut": (cut, "a.safetensors must be a whole safetensors file"),
    "header": (header, "a.safetensors must be a whole safetensors file"),
    "index without file": (index_without_file, r"must name files that exist, got model-00002"),
    "index damaged": (index_damaged, "must hold a weight_map in JSON"),
    "directory without model": (lambda directory, file: directory, "path must have model.safetensors"),
    "metadata": (metadata_damaged, "nf4kernels.lora in .* must hold adapter configurations"),
    "missing": (edited(lambda t: t.pop("up.bias")), r"missing \['up.bias'\], unknown \[\]"),
    "unknown": (edited(lambda t: t.update(extra=torch.ones(1))), r"missing \[\], unknown \['extra'\]"),
    "shape": (edited(lambda t: t.update({"up.bias": torch.ones(5)})), r"up.bias must have shape \[96\], got \[5\]"),
    "dense instead": (
        edited(lambda t: t.pop("down.weight.quant_state.bitsandbytes__nf4")),
        r"unknown \['down.weight.absmax'",
    ),
    "layer shape": (
        edited(lambda t: t.update(nf4.weight_to_tensors(quantized(torch.randn(64, 64)), "down.weight"))),
        r"down.weight must have shape \[64, 96\], got \[64, 64\]",
    ),
    "layer name": (
        edited(lambda t: t.update(nf4.weight_to_tensors(quantized(torch.randn(4, 4)), "sideways.weight"))),
        "model must have a Linear or QuantLinear as sideways, got no such layer",
    ),
    "not a layer": (
        edited(lambda t: t.update(nf4.weight_to_tensors(quantized(torch.randn(50, 64)), "embed.weight"))),
        "model must have a Linear or QuantLinear as embed, got Embedding",
    ),
}


@pytest.mark.parametrize("quantize_first", [False, True])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_change_nothing(case, quantize_first, tmp_path):
    write, message = BAD_FILES[case]
    net, model = Net(), Net()
    nf4.quantize_model(net, progress=False)
    nf4.save_checkpoint(net, tmp_path / "a.safetensors")
    path = write(tmp_path, tmp_path / "a.safetensors") or tmp_path / "a.safetensors"
    if quantize_first:
        nf4.quantize_model(model, progress=False)
        message = message.replace("unknown \\['down.weight.absmax'", "must have a 4-bit weight down.weight, got none")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"nf4kernels\.load_checkpoint: .*{message}"):
        nf4.load_checkpoint(model, path)
    assert_unchanged(model, before)


def test_dense_checkpoint_for_a_quantized_layer_is_refused(tmp_path):
    save_file({"fc.weight": torch.randn(4, 4)}, tmp_path / "a.safetensors")
    model = nn.ModuleDict({"fc": nf4.QuantLinear(4, 4, bias=False)})
    with pytest.raises(ValueError, match=r"the checkpoint must have a 4-bit weight fc\.weight, got none"):
        nf4.load_checkpoint(model, tmp_path / "a.safetensors")


def test_adapter_without_its_configuration_is_refused(net, tmp_path):
    nf4.save_checkpoint(net, tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"unknown \[.*'up\.lora_A\.weight'"):
        nf4.load_checkpoint(model, tmp_path / "b.safetensors")
    assert_unchanged(model, before)


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"save_checkpoint: model must be an nn\.Module, got dict"):
        nf4.save_checkpoint({}, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"load_checkpoint: model must be an nn\.Module, got dict"):
        nf4.load_checkpoint({}, tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"path must be a safetensors file or a directory, got .*a\.s"):
        nf4.load_checkpoint(Net(), tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"fc\.weight in model's state must be a loaded tensor, got a meta tensor"):
        nf4.save_checkpoint(model, tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        nf4.save_checkpoint(Net(), tmp_path / "no such directory" / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_failed_write_leaves_the_old_file(net, tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    nf4.save_checkpoint(net, file)
    before = file.read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("nf4kernels.storage.tensor_files.save_file", half)
    with pytest.raises(OSError, match="No space left"):
        nf4.save_checkpoint(net, file)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert file.read_bytes() == before
