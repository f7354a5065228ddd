"""Checkpoints: the same bits as bitsandbytes both ways, and damaged files that change nothing."""

import copy
import json
import math
import os
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import cases
from torch import nn

import nf4kernels as nf4
from nf4kernels.codebook import CODEBOOKS

SCALES = ("e4m3", "dynamic8", None)


def quantized(weight, codebook="nf4", scale="e4m3", block_size=64):
    options = {"double_quant": False} if scale is None else {"scale_codebook": scale}
    return nf4.quantize(weight, codebook, block_size, **options)


def assert_same_weight(got, expected):
    for name in ("packed", "absmax", "scale_absmax", "scale_offset", "code", "scale_code"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert a.shape == b.shape, name
            assert torch.equal(a, b), name
    for name in ("shape", "dtype", "block_size", "codebook", "scale_codebook"):
        assert getattr(got, name) == getattr(expected, name), name


def state_of(tensors, bnb):
    """bitsandbytes' QuantState of what is stored as "weight"."""
    parts = {name.removeprefix("weight."): tensor.clone() for name, tensor in tensors.items() if name != "weight"}
    return bnb.functional.QuantState.from_dict(parts, device="cpu")


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no checkpoint is compared to it")


@hypothesis.given(
    st.integers(0, 40), st.integers(0, 200), st.sampled_from([*CODEBOOKS, "custom"]), st.sampled_from(SCALES),
    st.sampled_from(cases.BLOCK_SIZES[:4]), st.sampled_from(cases.DTYPES),
)  # fmt: skip
@hypothesis.settings(max_examples=60)
def test_every_weight_reads_back(N, K, codebook, scale, block_size, dtype):
    weight = torch.randn(N, K).to(dtype)
    qweight = quantized(weight, cases.CUSTOM_CODE if codebook == "custom" else codebook, scale, block_size)
    tensors = nf4.weight_to_tensors(qweight, "a.weight")
    assert_same_weight(nf4.weight_from_tensors(tensors, "a.weight"), qweight)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
def test_bitsandbytes_decodes_ours(bnb, codebook, scale, block_size, dtype):
    # 300 * 1024 / 64 blocks are 18.75 superblocks.
    qweight = quantized(torch.randn(300, 1024).to(dtype), codebook, scale, block_size)
    tensors = nf4.weight_to_tensors(qweight, bitsandbytes=True)
    state = state_of(tensors, bnb)
    assert state.dtype == dtype
    assert torch.equal(bnb.functional.dequantize_4bit(tensors["weight"], state), nf4.dequantize(qweight, dtype))


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [64, 256])
def test_we_decode_theirs(bnb, codebook, nested, storage, block_size):
    weight = torch.randn(300, 1024)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=nested, quant_type=codebook, quant_storage=storage
    )
    expected = bnb.functional.dequantize_4bit(packed, state)
    tensors = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    qweight = nf4.weight_from_tensors(tensors)
    assert torch.equal(nf4.dequantize(qweight, torch.float32), expected)
    assert (qweight.codebook, qweight.block_size) == (codebook, block_size)
    assert qweight.scale_codebook == ("dynamic8" if nested else None)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
def test_names_shapes_and_json_bytes_are_theirs(bnb, nested, dtype):
    weight = torch.randn(32, 64).to(dtype)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    theirs = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    rewritten = nf4.weight_to_tensors(nf4.weight_from_tensors(theirs))
    assert rewritten.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert rewritten[name].dtype == tensor.dtype, name
        assert rewritten[name].shape == tensor.shape, name
        assert torch.equal(rewritten[name], tensor), name


def test_json_bytes_of_our_own_quantization():
    qweight = quantized(torch.randn(32, 64), scale="dynamic8")
    stored = nf4.weight_to_tensors(qweight)["weight.quant_state.bitsandbytes__nf4"]
    assert bytes(stored.numpy()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 64], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {qweight.scale_offset.item()!r}}}'
    )


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_layer_state_loads(bnb, nested, tmp_path):
    layer = bnb.nn.Linear4bit(128, 96, compress_statistics=nested, quant_type="nf4").to("cpu")
    save_file({f"fc.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "a.safetensors")
    model = nn.ModuleDict({"fc": nn.Linear(128, 96)})
    nf4.load_checkpoint(model, tmp_path / "a.safetensors")
    expected = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert torch.equal(model["fc"].dequantize(torch.float32), expected)
    assert torch.equal(model["fc"].bias, layer.bias)


@pytest.mark.parametrize("codebook", ["int4", "af4", "custom"])
def test_other_codebooks_have_their_own_key(codebook):
    qweight = quantized(torch.randn(8, 64), cases.CUSTOM_CODE if codebook == "custom" else codebook)
    assert f"weight.quant_state.nf4kernels__{codebook}" in nf4.weight_to_tensors(qweight)
    with pytest.raises(ValueError, match=rf"codebook must be 'nf4' or 'fp4' in bitsandbytes' format, got '{codebook}'"):
        nf4.weight_to_tensors(qweight, bitsandbytes=True)


# Each entry: what is done to the tensors, and what the message must name.
STATE = "weight.quant_state.bitsandbytes__nf4"


def with_metadata(**changes):
    def damage(tensors):
        metadata = json.loads(bytes(tensors[STATE].numpy()))
        metadata = {name: value for name, value in {**metadata, **changes}.items() if value != "REMOVED"}
        tensors[STATE] = torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8)

    return damage


def replaced(name, change):
    def damage(tensors):
        tensors[name] = change(tensors[name])

    return damage


DAMAGE = {
    "no metadata": (lambda t: t.pop(STATE), "weight.quant_state"),
    "metadata twice": (lambda t: t.update({STATE + "x": t[STATE].clone()}), "weight.quant_state"),
    "no packed": (lambda t: t.pop("weight"), "must have weight"),
    "no absmax": (lambda t: t.pop("weight.absmax"), "weight.absmax"),
    "no map": (lambda t: t.pop("weight.quant_map"), "weight.quant_map"),
    "no nested absmax": (lambda t: t.pop("weight.nested_absmax"), "weight.nested_absmax"),
    "no nested map": (lambda t: t.pop("weight.nested_quant_map"), "weight.nested_quant_map"),
    "packed cut": (replaced("weight", lambda t: t[:-1]), "weight must have 1024 elements, got 1023"),
    "absmax cut": (replaced("weight.absmax", lambda t: t[:-1]), "weight.absmax must have 32 elements"),
    "absmax dtype": (replaced("weight.absmax", lambda t: t.float()), "absmax must be torch.uint8"),
    "map cut": (replaced("weight.quant_map", lambda t: t[:8]), "weight.quant_map must hold 16 levels"),
    "map of another": (replaced("weight.quant_map", lambda t: CODEBOOKS["af4"]), "must be the nf4 codebook"),
    "nested cut": (replaced("weight.nested_quant_map", lambda t: t[:100]), "scale_code must have shape"),
    "nested absmax": (replaced("weight.nested_absmax", lambda t: t.half()), "scale_absmax must be torch.float32"),
    "json cut": (replaced(STATE, lambda t: t[:-5]), f"{STATE} must hold a quant_state"),
    "json bytes": (replaced(STATE, lambda t: t | 0x80), f"{STATE} must hold a quant_state"),
    "json a list": (replaced(STATE, lambda t: torch.tensor([91, 93], dtype=torch.uint8)), f"{STATE} must hold"),
    "shape 1-D": (with_metadata(shape=[2048]), rf"shape in {STATE} must be \[N, K\]"),
    "shape text": (with_metadata(shape=["a", "b"]), rf"shape in {STATE}"),
    "shape gone": (with_metadata(shape="REMOVED"), f"{STATE} must hold a quant_state"),
    "shape other": (with_metadata(shape=[32, 128]), "weight must have 2048 elements, got 1024"),
    "dtype": (with_metadata(dtype="int8"), f"dtype in {STATE} must be float32"),
    "block size": (with_metadata(blocksize=63), "block_size must be one of"),
    "block size text": (with_metadata(blocksize="64"), f"blocksize in {STATE} must be an integer"),
    "quant type": (with_metadata(quant_type="fp4"), f"quant_type in {STATE}"),
    "offset": (with_metadata(nested_offset=math.nan), "nested_offset in .* must be finite"),
    "offset text": (with_metadata(nested_offset="0.1"), "nested_offset in .* must be finite"),
    "nested size": (with_metadata(nested_blocksize=128), "nested_blocksize and nested_dtype"),
    "nested dtype": (with_metadata(nested_dtype="float16"), "nested_blocksize and nested_dtype"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights_are_refused(case, tmp_path):
    damage, message = DAMAGE[case]
    tensors = nf4.weight_to_tensors(quantized(torch.randn(32, 64)))
    damage(tensors)
    with pytest.raises((TypeError, ValueError), match=message):
        nf4.weight_from_tensors(tensors)
    model = nn.ModuleDict({"fc": nn.Linear(64, 32, bias=False)})
    before = snapshot(model)
    save_file({f"fc.{name}": tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"nf4kernels\.load_checkpoint"):
        nf4.load_checkpoint(model, tmp_path / "a.safetensors")
    assert_unchanged(model, before)


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


def snapshot(model):
    return copy.deepcopy(model.state_dict()), [(name, type(module)) for name, module in model.named_modules()]


def assert_unchanged(model, before):
    state, modules = before
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert_same_state(model.state_dict(), state)


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
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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
    (directory / "model.safetensors.index.json").write_text('{"weight_map": 3')
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

    monkeypatch.setattr("nf4kernels.storage.checkpoint.save_file", half)
    with pytest.raises(OSError, match="No space left"):
        nf4.save_checkpoint(net, file)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert file.read_bytes() == before
