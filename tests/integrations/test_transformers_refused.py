"""What from_pretrained refuses, each by one sentence, before there is a model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.directories import dense_directory, load

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_directory(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def saved(dense, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    load(dense, quantization_config=Nf4Config()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sharded(dense, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    load(dense, quantization_config=Nf4Config()).save_pretrained(directory, max_shard_size="20KB")
    return directory


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    directory = dense_directory(tmp_path_factory.mktemp("dense_experts"), "Mixtral")
    load(directory, quantization_config=Nf4Config()).save_pretrained(directory / "saved")
    return directory / "saved"


def copy_with(directory, target, tensors=None, **fields):
    """A copy, its tensors changed by a function and its quantization_config by fields."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if fields:
        config["quantization_config"].update(fields)
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tensors is not None:
        state = load_file(target / "model.safetensors")
        tensors(state)
        save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"block_size": 128},
            ValueError,
            "must have block size 128 as the configuration says, got 64 in",
        ),
        (
            {"codebook": "fp4"},
            ValueError,
            "must have codebook fp4 as the configuration says, got nf4 in",
        ),
        ({"double_quant": False}, ValueError, "must have double_quant False as the configuration says, got True in"),
        ({"colour": 3}, TypeError, "fields must be among codebook, .*, got colour$"),
        ({"load_in_4bit": True}, TypeError, "fields must be among codebook, .*, got load_in_4bit$"),
    ],
)
def test_a_config_that_contradicts_its_checkpoint(saved, tmp_path, fields, error, message):
    with pytest.raises(error, match=r"nf4kernels\.Nf4Config: .*" + message):
        load(copy_with(saved, tmp_path / "copy", **fields))


def test_other_levels_than_the_checkpoint_has(dense, tmp_path):
    levels = [i / 15 * 2 - 1 for i in range(16)]
    load(dense, quantization_config=Nf4Config(codebook=levels)).save_pretrained(tmp_path / "saved")
    others = [level * 0.5 for level in levels]
    with pytest.raises(ValueError, match="the checkpoint must have the configuration's codebook, got another in"):
        load(copy_with(tmp_path / "saved", tmp_path / "copy", codebook=others))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"block_size": 128}, "block_size must be 64 as the checkpoint has it, got 128"),
        ({"codebook": "fp4"}, "codebook must be 'nf4' as the checkpoint has it, got 'fp4'"),
        ({"double_quant": False}, "double_quant must be True as the checkpoint has it, got False"),
        ({"scale_codebook": "dynamic8"}, "scale_codebook must be 'e4m3' as the checkpoint has it, got 'dynamic8'"),
        ({"skip": ["q_proj"]}, "skip must be empty for a checkpoint that is in 4 bits already, got ..q_proj"),
    ],
)
def test_asking_for_something_else(saved, asked, message):
    with pytest.raises(ValueError, match=r"nf4kernels\.Nf4Config: " + message):
        load(saved, quantization_config=Nf4Config(**asked))


def test_what_may_be_asked_of_a_4_bit_checkpoint(saved, recwarn):
    model = load(saved, quantization_config=Nf4Config(compute_dtype=torch.float32))
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    assert not [w for w in recwarn if "quantization_config" in str(w.message)]


def test_bitsandbytes_options_beside_ours(dense, saved):
    transformers = pytest.importorskip("transformers")
    for directory in (dense, saved):
        with pytest.raises(TypeError, match="load_in_4bit"):
            load(directory, quantization_config=Nf4Config(), load_in_4bit=True)
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: its configuration cannot be made")
    with pytest.raises(ValueError, match="is quantized with Nf4Config but you are passing a BitsAndBytesConfig"):
        load(saved, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))


def test_a_missing_shard(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "copy")
    gone = sorted((tmp_path / "copy").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises((ValueError, OSError), match=gone.name):
        load(tmp_path / "copy")


@pytest.mark.parametrize("which", ["dense", "sharded"])
def test_a_truncated_file(request, tmp_path, which):
    shutil.copytree(request.getfixturevalue(which), tmp_path / "copy")
    file = sorted((tmp_path / "copy").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8])
    options = {"quantization_config": Nf4Config()} if which == "dense" else {}
    with pytest.raises(ValueError, match=f"{file.name} must be a whole safetensors file"):
        load(tmp_path / "copy", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{UP}.absmax", rf"the checkpoint must have {UP}\.absmax, got none"),
        (f"{UP}.nested_quant_map", rf"the checkpoint must have {UP}\.nested_quant_map, got none"),
        (UP, rf"the checkpoint must have {UP}, got none"),
        (f"{UP}.quant_state.bitsandbytes__nf4", rf"the checkpoint must have {UP}\.quant_state\.\* beside"),
    ],
)
def test_a_missing_part(saved, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        load(copy_with(saved, tmp_path / "copy", lambda state: state.pop(name)))


def test_a_part_of_another_size(saved, tmp_path):
    def cut(state):
        state[UP] = state[UP][:-1].clone()

    with pytest.raises(ValueError, match=f"{UP} must have 4096 elements, got 4095"):
        load(copy_with(saved, tmp_path / "copy", cut))


def test_a_part_in_another_dtype_is_named_though_weights_come_after_it(saved, tmp_path):
    first = "model.layers.0.mlp.down_proj.weight"

    def cast(state):
        state[f"{first}.nested_absmax"] = state[f"{first}.nested_absmax"].half()

    with pytest.raises(TypeError, match=rf"{first}: .* scale_absmax must be torch.float32, got torch.float16"):
        load(copy_with(saved, tmp_path / "copy", cast))


def test_a_weight_of_another_shape(dense, tmp_path):
    def other(state):
        state[UP] = torch.zeros(64, 64, dtype=torch.bfloat16)

    with pytest.raises(ValueError, match=rf"{UP}: the checkpoint must have it in shape \[128, 64\], got \[64, 64\]"):
        load(copy_with(dense, tmp_path / "copy", other), quantization_config=Nf4Config())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(dense, tmp_path, value):
    def spoil(state):
        state[UP][3, 5] = value

    with pytest.raises(ValueError, match=rf"{UP}: .*weight must be finite, got {value} at row 3, column 5"):
        load(copy_with(dense, tmp_path / "copy", spoil), quantization_config=Nf4Config())


def test_an_expert_that_is_not_finite(tmp_path):
    def spoil(state):
        name = next(name for name in state if name.endswith("experts.2.w3.weight"))
        state[name][1, 2] = float("inf")

    directory = copy_with(dense_directory(tmp_path / "dense", "Mixtral"), tmp_path / "copy", spoil)
    with pytest.raises(ValueError, match=r"gate_up_proj: .*expert 2: .*weight must be finite, got inf at row 129"):
        load(directory, quantization_config=Nf4Config())


def test_codes_of_experts_that_were_changed(experts, tmp_path):
    def change(state):
        name = next(name for name in state if name.endswith("down_proj.weight"))
        state[name][1, 2, 3] ^= 1

    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj must hold the bytes that its checksum is of"):
        load(copy_with(experts, tmp_path / "copy", change))


@pytest.mark.parametrize("fields", [{"block_size": 32}, {"codebook": "fp4"}, {"double_quant": False}])
def test_experts_that_contradict_the_config(experts, tmp_path, fields):
    def experts_alone(state):  # so that no QuantLinear is the first to be refused
        for name in [name for name in state if "self_attn" in name and ".weight." in name]:
            del state[name]
        for name in [name for name in state if "self_attn" in name]:
            del state[name]

    with pytest.raises(ValueError, match=r"nf4kernels\.Nf4Config: .*experts\.(gate_up|down)_proj"):
        load(copy_with(experts, tmp_path / "copy", experts_alone, **fields))


def test_a_checkpoint_without_a_4_bit_weight(saved, dense, tmp_path):
    copy_with(saved, tmp_path / "copy")
    shutil.copy(dense / "model.safetensors", tmp_path / "copy" / "model.safetensors")
    with pytest.raises(ValueError, match="must have weights in 4 bits, as the configuration says, got none"):
        load(tmp_path / "copy")


def test_a_name_that_skip_does_not_find(dense):
    with pytest.raises(ValueError, match="skip must match a layer, got 'zzz'"):
        load(dense, quantization_config=Nf4Config(skip=["zzz"]))


def test_a_dense_checkpoint_offloaded_to_disk(dense, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: nothing is offloaded")
    options = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match="device_map must not offload to disk while a dense checkpoint is quantized"):
        load(dense, quantization_config=Nf4Config(), **options)


@pytest.mark.parametrize("codebook", ["nf4", "int8"])
def test_a_bare_state_is_warned_of_and_not_taken_for_numbers(dense, tmp_path, codebook):
    """quantize_model gives transformers no quantizer, which would know how to write its layers."""
    model = load(dense)
    nf4.quantize_model(model, codebook=codebook, progress=False)
    with pytest.warns(match="q_proj is in 4 bits by quantize_model, .* save it by nf4kernels.save_checkpoint"):
        model.save_pretrained(tmp_path / "bare")
    for options in ({}, {"quantization_config": Nf4Config()}):
        with pytest.raises(
            ValueError, match="was in 4 bits by quantize_model, and what save_pretrained writes of such"
        ):
            load(tmp_path / "bare", **options)
    again = load(dense)
    nf4.quantize_model(again, codebook=codebook, progress=False)
    again.load_state_dict(load_file(tmp_path / "bare" / "model.safetensors"), strict=False)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, model(ids).logits)
