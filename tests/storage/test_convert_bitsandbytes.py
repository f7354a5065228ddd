"""`nf4kernels convert` of what transformers saved with bitsandbytes, and back; what it refuses."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.directories import dense_directory, load, logits, same_state, saved_by_bitsandbytes
from support.llama_directory import all_tensors, tree

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.integrations.transformers import Nf4Config
from nf4kernels.storage.convert_bitsandbytes import convert_bitsandbytes, convert_to_bitsandbytes
from nf4kernels.storage.directory_checks import ConversionError

INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
KINDS = {
    "Llama, nested": ("Llama", "nf4", {"bnb_4bit_use_double_quant": True}),
    "Llama, fp4": ("Llama", "fp4", {}),
    "tied, fp4 nested in bf16": (
        "tied", "fp4", {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
    ),
    "tied, in fp32": ("tied", "nf4", {"bnb_4bit_quant_storage": torch.float32}),
    "GPT-2": ("GPT-2", "nf4", {"bnb_4bit_use_double_quant": True}),
    "Mixtral, dense experts": ("Mixtral", "nf4", {"bnb_4bit_use_double_quant": True}),
}  # fmt: skip


def convert(*args):
    return main(["convert", *map(str, args)])


def config_of(directory):
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_bitsandbytes_decodes_there_and_back(kind, tmp_path, capsys):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: it saves no directory")
    family, quant_type, options = KINDS[kind]
    dense = dense_directory(tmp_path / "dense", family)
    expected = saved_by_bitsandbytes(dense, tmp_path / "theirs", quant_type, "30KB", **options)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert convert(tmp_path / "theirs", tmp_path / "ours") == 0
    assert f"{len(expected)} weights in {quant_type}, none of them changed" in capsys.readouterr().out
    model = load(tmp_path / "ours")
    layers = tiny.layers(model)
    assert layers.keys() == expected.keys() != set()
    assert all(torch.equal(layers[name].dequantize(torch.bfloat16), expected[name]) for name in layers)
    assert logits(model).isfinite().all()
    told = config_of(tmp_path / "ours")["quantization_config"]
    assert (told["quant_method"], told["codebook"]) == ("nf4kernels", quant_type)
    assert told["double_quant"] == bool(options.get("bnb_4bit_use_double_quant"))
    assert told["modules_to_not_convert"] == ["lm_head"]

    assert convert(tmp_path / "ours", tmp_path / "again", "--to", "bitsandbytes") == 0
    bytes_of_theirs = {
        name: t.view(torch.uint8).reshape(-1, 1) if name.removesuffix(".weight") in expected else t
        for name, t in all_tensors(tmp_path / "theirs").items()
    }
    assert_same_tensors(all_tensors(tmp_path / "again"), bytes_of_theirs)
    theirs = load(tmp_path / "again")
    packed = {n: m.weight for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert packed.keys() == expected.keys()
    assert all(
        torch.equal(bnb.functional.dequantize_4bit(w.data, w.quant_state), expected[n]) for n, w in packed.items()
    )


@pytest.fixture
def theirs(tmp_path):
    """A directory in bitsandbytes' format, of a dense one that is beside it."""
    dense_directory(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "theirs"), "--scale-codebook", "dynamic8"]) == 0
    return tmp_path / "theirs"


def test_the_rest_is_carried_over_and_an_output_is_kept(theirs, tmp_path, capsys):
    (theirs / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert convert(theirs, tmp_path / "ours") == 0
    assert tree(tmp_path / "ours") == tree(theirs)
    before = config_of(theirs)
    assert {**before, "quantization_config": config_of(tmp_path / "ours")["quantization_config"]} == config_of(
        tmp_path / "ours"
    )
    assert_same_tensors(all_tensors(tmp_path / "ours"), all_tensors(theirs))
    assert convert(theirs, tmp_path / "ours") == 2
    assert "DST must not exist (or say --overwrite)" in capsys.readouterr().err
    assert convert(theirs, tmp_path / "ours", "--overwrite") == 0
    filled = tiny.llama(torch.bfloat16)
    nf4.load_checkpoint(filled, tmp_path / "ours")
    assert same_state(filled, load(tmp_path / "ours"))


@pytest.mark.parametrize("function", [convert_bitsandbytes, convert_to_bitsandbytes])
def test_without_a_model_the_names_decide(function, theirs, tmp_path):
    done = function(theirs, tmp_path / "out", max_shard_size=20_000, progress=False)
    assert (done.weights, done.codebook) == (14, "nf4")
    told = config_of(tmp_path / "out")["quantization_config"]
    dense = told.get("modules_to_not_convert") or told["llm_int8_skip_modules"]
    assert dense == ["lm_head", "model.embed_tokens"]
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(theirs))
    assert (tmp_path / "out" / INDEX).exists()
    with pytest.raises(ConversionError, match=r"^nf4kernels\.storage.*: in_dir must be in 4 bits"):
        function(tmp_path / "dense", tmp_path / "other", progress=False)


def rewritten(change):
    """Of a directory: its one file with its tensors changed."""

    def rewrite(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return rewrite


def configured(**fields):
    def rewrite(directory):
        config = {**config_of(directory), "quantization_config": fields}
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return rewrite


def repacked(tensors):
    absmax = torch.rand(2, 64).bfloat16()
    tensors.update(nf4.weight_to_tensors(nf4.quantize(torch.randn(64, 128), double_quant=False), "other.weight"))
    tensors["other.weight.absmax"] = absmax


def repacked_nested(tensors):
    state = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[state].numpy()).decode().replace('"nested_dtype": "float32"', '"nested_dtype": "bfloat16"')
    tensors[state] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def other_levels(tensors):
    tensors[f"{WEIGHT}.quant_map"] = torch.linspace(-1, 1, 16)


def another_kind(tensors):
    weight = nf4.dequantize(nf4.weight_from_tensors(tensors, WEIGHT))
    for name in [name for name in tensors if name.startswith(f"{WEIGHT}.")]:
        del tensors[name]
    tensors.update(nf4.weight_to_tensors(nf4.quantize(weight, "fp4", 128), WEIGHT))


def cut(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def indexed(directory):
    names = {**dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors"), "a": "model.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": names}), encoding="utf-8")


DAMAGED = {
    "8 bits": (
        configured(quant_method="bitsandbytes", load_in_8bit=True, load_in_4bit=False),
        "SRC must be dense or in 4 bits of nf4kernels or bitsandbytes, got one quantized by bitsandbytes in 8 bits",
    ),
    "another method": (configured(quant_method="aqlm"), "quant_method must be one of"),
    "reordered scales": (rewritten(repacked), "other.weight.absmax must have one dimension, got [2, 64], as bitsandb"),
    "reordered, nested": (rewritten(repacked_nested), "got 256 and 'bfloat16', as bitsandbytes leaves a weight"),
    "no scales": (rewritten(lambda t: t.pop(f"{WEIGHT}.absmax")), f"tensors must have {WEIGHT}.absmax, got none"),
    "no metadata": (
        rewritten(lambda t: t.pop(f"{WEIGHT}.quant_state.bitsandbytes__nf4")),
        f"the checkpoint must have {WEIGHT}.quant_state.* beside {WEIGHT}.",
    ),
    "other levels": (rewritten(other_levels), f"{WEIGHT}.quant_map must be the nf4 codebook"),
    "two kinds": (rewritten(another_kind), "SRC must have one codebook, block size and kind of scales, got"),
    "cut": (cut, "must be a whole safetensors file"),
    "a tensor too many in the index": (indexed, f"{INDEX} must list the tensors of its files, a is in one of the two"),
    "no file": (lambda directory: (directory / "model.safetensors").unlink(), "must have model.safetensors"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_refused_in_one_line(kind, theirs, tmp_path, capsys):
    damage, message = DAMAGED[kind]
    damage(theirs)
    before = tree(tmp_path)
    capsys.readouterr()
    assert convert(theirs, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nf4kernels convert: ")
    assert message in line
    assert "weight_from_tensors" not in line
    assert tree(tmp_path) == before


def test_experts_one_by_one_in_4_bits(tmp_path, capsys):
    """As transformers 4 had them: the model holds them in two weights, whose offsets two matrices cannot share."""
    dense_directory(tmp_path / "dense", "Mixtral")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "theirs"), "--skip", "experts"]) == 0
    tensors = all_tensors(tmp_path / "theirs")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors |= nf4.weight_to_tensors(nf4.quantize(tensors.pop(name)), name)
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    assert convert(tmp_path / "theirs", tmp_path / "out") == 2
    assert f"{name} must be dense, since the model has it inside of model.layers.0.mlp.experts" in (
        capsys.readouterr().err
    )
    assert sorted(os.listdir(tmp_path)) == ["dense", "theirs"]


def test_a_layer_that_transformers_would_leave_dense(theirs, tmp_path):
    """It goes by the ends of names, too; without a model they are the file's."""
    tensors = all_tensors(theirs)
    tensors["proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, theirs / "model.safetensors")
    with pytest.raises(ConversionError, match="proj must not end with the name of a dense layer"):
        convert_to_bitsandbytes(theirs, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert convert_bitsandbytes(theirs, tmp_path / "out", progress=False).weights == 14


def test_what_bitsandbytes_has_no_format_for(tmp_path, capsys):
    ours = load(dense_directory(tmp_path / "dense"), quantization_config=Nf4Config(codebook="af4"))
    ours.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "out", "--to", "bitsandbytes") == 2
    assert "codebook must be 'nf4' or 'fp4' in bitsandbytes' format, got 'af4'" in capsys.readouterr().err
    assert convert(tmp_path / "ours", tmp_path / "out") == 2
    assert "SRC must be published in 4 bits by others" in capsys.readouterr().err
    assert convert(tmp_path / "dense", tmp_path / "out", "--to", "bitsandbytes") == 2
    assert "SRC must be in 4 bits, got a dense model: nf4kernels quantize makes one" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["dense", "ours"]


@pytest.mark.slow
def test_smollm2_there_and_back(tmp_path):
    """A real model of 210 layers with tied embeddings, quantized by bitsandbytes: not a bit changes."""
    dense = os.environ.get("NF4KERNELS_SMOLLM2", ".cache/SmolLM2-135M-Instruct")
    if not os.path.isdir(dense):
        pytest.skip("SmolLM2-135M-Instruct is not at hand: make demo downloads it")
    expected = saved_by_bitsandbytes(dense, tmp_path / "theirs", shard_size="50MB", bnb_4bit_use_double_quant=True)
    assert convert(tmp_path / "theirs", tmp_path / "ours") == 0
    layers = tiny.layers(load(tmp_path / "ours"))
    assert len(layers) == len(expected) == 210
    assert all(torch.equal(layers[name].dequantize(torch.bfloat16), expected[name]) for name in layers)
    assert convert(tmp_path / "ours", tmp_path / "again", "--to", "bitsandbytes") == 0
    assert_same_tensors(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "theirs"))
